"""calibrate: what every expert's inputs look like, and codes solved on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from v4quant.api.arguments import (
    PathLike,
    Size,
    SourceLike,
    asked_of,
    config_of,
    corpus_names,
    forward_options,
    given_names,
    listed_files,
    output_of,
    path_of,
    read_corpus,
    size_of,
    source_of,
)
from v4quant.builtin import MIXED_CALIBRATION
from v4quant.calibration.collect import (
    DrawnCorpus,
    calibrate_to,
    draw_corpus,
    reserve_of,
    solve_settings,
)
from v4quant.calibration.provenance import provenance_of
from v4quant.calibration.ranks import solving_team
from v4quant.conversion.calibrated import solved_part, stats_of
from v4quant.devices import arithmetic_threads, find_device
from v4quant.existing import NewFiles, imatrix_file, place_beside, put_in_place, statistics_file
from v4quant.finished import request_of
from v4quant.outputs import refuse_inputs
from v4quant.progress import default_progress
from v4quant.recipe import Recipe, read_toml, recipe_from_table
from v4quant.source import open_source
from v4quant_calibration.corpus.chat_dialects import DEFAULT_MODE
from v4quant_calibration.corpus.chat_keys import MESSAGES
from v4quant_calibration.corpus.corpus import Corpus
from v4quant_calibration.defaults import MIN_TOKENS
from v4quant_calibration.solve.solution import SOLUTION_NAME
from v4quant_calibration.statistics.collect import Calibration
from v4quant_calibration.statistics.coverage import coverage
from v4quant_calibration.statistics.imatrix import save_imatrix
from v4quant_calibration.statistics.stats import Stats
from v4quant_formats.sidecars import TOKENIZER, place_of
from v4quant_kernels.errors import OptionError
from v4quant_kernels.progress import Progress, SilentProgress


@dataclass(frozen=True)
class CalibrationResult:
    """path: the file of statistics, or the solution's folder. tokens: how many were read.

    coverage: tokens each expert saw, and the experts below `min_tokens`. stats: the statistics.
    skipped_rows: rows of the corpus left out because they cannot be read.
    """

    path: str
    tokens: int
    solved: bool
    coverage: dict[str, Any]
    stats: Stats = field(repr=False)
    skipped_rows: int = 0

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        told = {"stats": self.path, "tokens": self.tokens, "skipped_rows": self.skipped_rows}
        return {**told, **self.coverage}


def calibrate(
    source: SourceLike,
    out: PathLike,
    *,
    corpus: PathLike | Sequence[PathLike] = MIXED_CALIBRATION,
    tokens: int | None = None,
    seq_len: int | None = None,
    tokenizer: PathLike | None = None,
    mode: str = DEFAULT_MODE,
    chat_keys: str = MESSAGES,
    skip_bad_rows: int = 0,
    activations: str = "plain",
    products: str = "f32",
    min_tokens: int = MIN_TOKENS,
    solve: str | None = None,
    dense: str = "",
    recipe: Recipe | PathLike | None = None,
    propagate: bool = True,
    device: str = "cpu",
    threads: int | None = None,
    max_memory: Size = None,
    imatrix: PathLike | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> CalibrationResult:
    """Run a corpus through checkpoint `source`; write statistics, or a solution, to `out`.

    tokenizer: a tokenizer.json for text, where the checkpoint has none of its own. tokens: how many
    to read first; more of the corpus is drawn until every expert has seen `min_tokens`. solve: a
    scheme whose codes are found as well, or `recipe`: what to solve place by place; an interrupted
    run then resumes. propagate: later layers are solved on what the already converted ones give
    them; under torchrun the ranks divide the work of solving, and each returns the result. threads:
    of products on the CPU, by default all cores or what OMP_NUM_THREADS says. imatrix: a file to
    write as well, what llama.cpp's quantizer reads. overwrite: files that `calibrate` wrote, or
    another solution in `out`, may be replaced, once the new ones are whole.

    Raises OptionError, RecipeError, CorpusError, SizeError, OutputError and what opening the source
    raises.
    """
    asked = asked_of("calibrate", locals())
    if min_tokens < 1:
        raise OptionError(f"min_tokens is {min_tokens}; an expert that nobody saw tells nothing")
    wanted = _recipe(solve, dense, recipe)
    where, cap = find_device(device), size_of(max_memory)
    target, matrix = output_of(out), None if imatrix is None else output_of(imatrix)
    if matrix is not None and wanted is not None:
        raise OptionError(
            "--imatrix does not go with --solve: what a solved layer sees are the converted "
            "model's inputs; calibrate once more without --solve"
        )
    with (
        arithmetic_threads(threads),
        open_source(source_of(source), tokenizer=path_of(tokenizer)) as checkpoint,
        solving_team(where) as (team, where),
    ):
        refuse_inputs(
            [target, *filter(None, [matrix])], [checkpoint], listed_files(corpus),
            [target] if wanted else [],
        )  # fmt: skip
        result = target / SOLUTION_NAME if wanted else target
        request = request_of(
            {**asked, "recipe": None if wanted is None else solved_part(wanted)},
            [*listed_files(corpus), place_of(checkpoint, TOKENIZER)],
            [checkpoint.digest()],
            [result, matrix],
        )
        known = request.answer() if team.is_first and not overwrite else None
        if (told := team.tell(known)) is not None:
            stats = stats_of(checkpoint, target)
            return CalibrationResult(
                str(target), told["tokens"], wanted is not None, coverage(stats), stats,
                told["skipped_rows"],
            )  # fmt: skip
        files = NewFiles(
            [] if wanted else [statistics_file(target), imatrix_file(matrix)],
            overwrite,
            request.key,
        )
        config = config_of(checkpoint)
        settings = solve_settings(checkpoint, wanted, propagate) if wanted else None

        def load(limit: int | None) -> Corpus:
            return read_corpus(
                corpus, checkpoint, config, seq_len, limit, mode, chat_keys, skip_bad_rows,
                reserve_of(tokens), cap,
            )  # fmt: skip

        @contextmanager
        def finishing(found: Calibration) -> Iterator[None]:
            if matrix is not None:
                names = corpus_names(corpus)
                save_imatrix(place_beside(matrix), found.stats, config, names, found.windows)
            with files.finishing(lambda: request.remember(_told(found.windows, drawn))):
                yield
                if matrix is not None:
                    put_in_place(matrix)

        drawn = draw_corpus(load, tokens)
        done = calibrate_to(
            checkpoint,
            config,
            drawn,
            forward_options(activations, products),
            min_tokens,
            settings,
            target,
            default_progress(progress) if team.is_first else SilentProgress(),
            cap,
            where,
            dense=matrix is not None,
            team=team,
            provenance=provenance_of(
                given_names(corpus), wanted, propagate, tokens=tokens, seq_len=seq_len, mode=mode,
                chat_keys=chat_keys, skip_bad_rows=skip_bad_rows, activations=activations,
                products=products, min_tokens=min_tokens, device=where.type,
            ),
            overwrite=overwrite,
            finishing=finishing,
        )  # fmt: skip
        if wanted and team.is_first:
            request.remember(_told(done.windows, drawn))
    return CalibrationResult(
        str(target),
        sum(map(len, done.windows)),
        settings is not None,
        coverage(done.stats),
        done.stats,
        drawn.skipped_rows,
    )


def _told(windows: Sequence[Tensor], drawn: DrawnCorpus) -> dict[str, Any]:
    """What is remembered of a calibration beside its files."""
    return {"tokens": sum(map(len, windows)), "skipped_rows": drawn.skipped_rows}


def _recipe(scheme: str | None, dense: str, given: Recipe | PathLike | None) -> Recipe | None:
    """The recipe to solve for, None where nothing is. Raises OptionError or RecipeError."""
    if given is not None:
        if scheme or dense:
            raise OptionError("--recipe states the schemes; leave --solve and --dense out")
        if isinstance(given, Recipe):
            return replace(given, solver="gptq")
        file = path_of(given)
        assert file is not None
        return replace(recipe_from_table(read_toml(file), str(file)), solver="gptq")
    if scheme is None:
        if dense:
            raise OptionError("--dense goes with --solve")
        return None
    return Recipe(scheme, dense=dense, solver="gptq")
