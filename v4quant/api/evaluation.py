"""evaluate: perplexity of a checkpoint, and its distance from a reference."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from v4quant.api.arguments import (
    PathLike,
    Size,
    SourceLike,
    adapter_of,
    asked_of,
    config_of,
    forward_options,
    given_names,
    listed_files,
    output_of,
    path_of,
    read_corpus,
    size_of,
    source_of,
    tool_facts,
)
from v4quant.builtin import MIXED_HELDOUT
from v4quant.devices import arithmetic_threads, find_device
from v4quant.evaluation.evaluate import (
    LogitFiles,
    Resources,
    evaluate_checkpoint,
)
from v4quant.evaluation.kld_file import KldFile, is_kld
from v4quant.evaluation.report import write_report
from v4quant.evaluation.result import Evaluation, evaluation_from_dict
from v4quant.existing import NewFiles, logits_file, place_beside, put_in_place, report_file
from v4quant.finished import request_of
from v4quant.outputs import refuse_inputs
from v4quant.progress import default_progress
from v4quant.source import open_source
from v4quant_calibration.corpus.chat_dialects import DEFAULT_MODE
from v4quant_calibration.corpus.chat_keys import MESSAGES
from v4quant_calibration.corpus.corpus import Corpus
from v4quant_calibration.corpus.tokenizer import tokenizer_of
from v4quant_calibration.evaluation.evaluate import Measures
from v4quant_calibration.evaluation.needle import make_needles
from v4quant_formats.sidecars import TOKENIZER, place_of
from v4quant_kernels.errors import OptionError
from v4quant_kernels.progress import Progress
from v4quant_kernels.user_cache import cache_folder


def evaluate(
    source: SourceLike,
    *,
    reference: SourceLike | None = None,
    adapter: SourceLike | None = None,
    candidates: Sequence[SourceLike] = (),
    corpus: PathLike | Sequence[PathLike] = MIXED_HELDOUT,
    tokens: int | None = None,
    seq_len: int | None = None,
    tokenizer: PathLike | None = None,
    mode: str = DEFAULT_MODE,
    chat_keys: str = MESSAGES,
    skip_bad_rows: int = 0,
    activations: str = "plain",
    products: str = "f32",
    save_logits: PathLike | None = None,
    save_top_k: int | None = None,
    reference_logits: PathLike | None = None,
    report: PathLike | None = None,
    overwrite: bool = False,
    weights: bool = True,
    floors: int = 1,
    draft: bool = False,
    needle: bool = False,
    device: str = "cpu",
    threads: int | None = None,
    max_memory: Size = None,
    scratch: PathLike | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Perplexity of `source`; with `reference` also KL, top-1 agreement and the noise floor.

    candidates: further conversions of the reference, scored in the same run. adapter: a LoRA
    adapter's folder or repository, merged into the reference, or without one into `source`.
    tokenizer: a tokenizer.json for text, where the checkpoint has none of its own. weights: compare
    every matrix with the reference's and look for defects. floors: noise floors to run. report: a
    .html, .md or .json file to write. overwrite: report and saved logits may replace earlier ones
    that `evaluate` wrote. Finished layers are kept beside it, or in the user's cache
    folder, until the run ends well: the same call goes on behind them. threads: of products on the
    CPU, by default all cores or what OMP_NUM_THREADS says. reference_logits: what `save_logits`
    wrote, or llama.cpp's base file, whose own text is then scored. docs/evaluation.md explains the
    figures.

    Raises OptionError for options that contradict each other, SizeError for too little memory,
    CorpusError, EvaluationError, LogitsError, KldError, OutputError and what opening checkpoints
    raises.
    """
    asked = asked_of("evaluate", locals())
    if candidates and reference is None:
        raise OptionError(
            "--candidate compares conversions of one source: give --reference as well"
        )
    if candidates and save_logits is not None:
        raise OptionError("--save-logits writes one checkpoint's logits: leave --candidate out")
    if save_top_k is not None and save_logits is None:
        raise OptionError("--save-top-k says how --save-logits writes: give that, too")
    page = None if report is None else output_of(report)
    rows = None if save_logits is None else output_of(save_logits)
    beside = page or rows
    kept = beside.absolute().parent if beside is not None else cache_folder()
    limits = Resources(size_of(max_memory), path_of(scratch), find_device(device), kept)
    with ExitStack() as opened:
        opened.enter_context(arithmetic_threads(threads))
        merged = adapter_of(adapter)
        own = merged if reference is None else None
        words = path_of(tokenizer)
        checkpoint = opened.enter_context(
            open_source(source_of(source), adapter=own, tokenizer=words)
        )
        base = None
        if reference is not None:
            base = opened.enter_context(open_source(source_of(reference), adapter=merged))
        others = [opened.enter_context(open_source(source_of(other))) for other in candidates]
        refuse_inputs(
            [rows, page],
            [checkpoint, base, *others],
            [*listed_files(corpus), path_of(reference_logits)],
        )
        logits = path_of(reference_logits)
        request = request_of(
            asked,
            [*listed_files(corpus), logits, place_of(checkpoint, TOKENIZER)],
            [one.digest() for one in (checkpoint, base, *others) if one is not None],
            [page, rows],
        )
        if not overwrite and (known := request.answer()) is not None:
            return evaluation_from_dict(dict(known))
        files = NewFiles([report_file(page), logits_file(rows)], overwrite, request.key)
        config = config_of(checkpoint)
        if logits is not None and is_kld(logits):
            text = _text_of(logits, corpus, seq_len, tokens, config.bos_token_id)
        else:
            text = read_corpus(
                corpus, checkpoint, config, seq_len, tokens, mode, chat_keys, skip_bad_rows,
                max_memory=limits.max_memory,
            )  # fmt: skip
        needles = None
        if needle:
            needles = make_needles(text, tokenizer_of(checkpoint), config.bos_token_id)
        figures = evaluate_checkpoint(
            checkpoint,
            base,
            text,
            forward_options(activations, products),
            default_progress(progress),
            LogitFiles(rows, save_top_k, logits, rows and place_beside(rows)),
            weights,
            Measures(floors, draft, needles),
            others,
            limits,
            opened,
        )
        found = evaluation_from_dict({"tool": tool_facts(), **figures})
        # Ends when what was kept is removed.
        opened.enter_context(files.finishing(lambda: request.remember(found.as_dict())))
        if page is not None:
            write_report(found, page)
        if rows is not None:
            put_in_place(rows)
    return found


def _text_of(
    file: Path,
    corpus: PathLike | Sequence[PathLike],
    seq_len: int | None,
    tokens: int | None,
    bos_token_id: int,
) -> Corpus:
    """The text that a base file of llama.cpp brings along. Raises KldError or OptionError."""
    with KldFile(file) as opened:
        length = opened.shape.n_ctx
        if given_names(corpus) != [MIXED_HELDOUT]:
            raise OptionError(f"{file} brings its own text: leave --corpus out")
        if seq_len not in (None, length):
            raise OptionError(f"{file} is of windows of {length} tokens: leave --seq-len out")
        return opened.corpus(tokens, bos_token_id)
