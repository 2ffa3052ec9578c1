"""The draft stage against its own trunk: by definition, damaged, and where there is none."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.conversion import TINY
from tests.support.shard_bytes import EditableCheckpoint
from v4quant_calibration.corpus.corpus import Corpus, CorpusPart
from v4quant_calibration.evaluation.divergence import DivergenceError
from v4quant_calibration.evaluation.evaluate import Measures, evaluate, evaluate_all
from v4quant_calibration.forward.checkpoint_params import CheckpointParams
from v4quant_calibration.forward.logits import mtp_logits, stream_logits
from v4quant_calibration.forward.stream import StreamModel, stream_forward
from v4quant_calibration.model.options import ForwardOptions
from v4quant_formats.model_config import load_model_config
from v4quant_formats.opening import open_checkpoint
from v4quant_kernels.progress import SilentProgress

DRAFT = Measures(draft=True)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    ids = load_file(TINY.parent / "tiny-a.reference.safetensors")["input_ids"][0]
    return Corpus([CorpusPart("a", list(ids[:150].split(50)))])


def draft_of(candidate: Path, reference: Path | None, corpus: Corpus) -> dict[str, object]:
    with open_checkpoint(candidate) as mine:
        if reference is None:
            found = evaluate(mine, None, corpus, ForwardOptions(), SilentProgress(), measures=DRAFT)
        else:
            with open_checkpoint(reference) as base:
                (found,) = evaluate_all(
                    [mine], base, corpus, ForwardOptions(), SilentProgress(), measures=DRAFT
                )
    draft: dict[str, object] = found["draft"]
    return json.loads(json.dumps(draft))  # type: ignore[no-any-return]


def test_by_definition(corpus: Corpus) -> None:
    """Whole logits, position by position, without the module's slicing."""
    config = load_model_config(TINY)
    target, text = [], []
    with open_checkpoint(TINY) as checkpoint:
        model = StreamModel(CheckpointParams(checkpoint))
        streams = stream_forward([model], config, corpus.windows)
        lengths = [len(ids) for ids in corpus.windows]
        (tile,) = stream_logits([model], config, streams, rows=1000)
        trunk = tile.logits[0].split(lengths)
        (tile,) = mtp_logits([model], config, corpus.windows, streams, rows=1000)
        draft = tile.logits[0].split(lengths)
    for ids, main, guess in zip(corpus.windows, trunk, draft, strict=True):
        for s in range(len(ids) - 2):
            target.append(int(guess[s].argmax()) == int(main[s + 1].argmax()))
            text.append(int(guess[s].argmax()) == int(ids[s + 2]))
    found = draft_of(TINY, None, corpus)
    assert found["tokens"] == len(target) == 3 * 48
    assert found["candidate"]["target_agreement"] == pytest.approx(sum(target) / len(target))  # type: ignore[index]
    assert found["candidate"]["text_agreement"] == pytest.approx(sum(text) / len(text))  # type: ignore[index]
    assert "reference" not in found and "change" not in found


def test_itself_changes_nothing(corpus: Corpus) -> None:
    found = draft_of(TINY, TINY, corpus)
    assert found["reference"] == found["candidate"]
    assert found["change"] == found["change_stderr"] == 0
    # Rounding alone may turn a guess or a choice, but hardly any.
    assert abs(found["noise_change"]) < 0.05  # type: ignore[arg-type]


def test_a_destroyed_draft_is_noticed_where_the_trunk_is_whole(tmp_path: Path) -> None:
    """On the trained model, whose draft guesses well: reversed bytes of one projection."""
    tiny = Path(__file__).parents[3] / "v4quant" / "data" / "tiny-v4"
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 2000, (4, 96), generator=generator)
    text = Corpus([CorpusPart("a", list(ids))])
    edited = EditableCheckpoint.read(tiny)
    tensor = edited["mtp.0.h_proj.weight"]
    tensor.data = tensor.data[::-1]
    broken = edited.write(tmp_path / "x")
    with open_checkpoint(tiny) as base, open_checkpoint(broken) as mine:
        (found,) = evaluate_all(
            [mine], base, text, ForwardOptions(), SilentProgress(), measures=DRAFT
        )
    draft = found["draft"]
    print(draft)
    assert found["kl_mean"] == 0
    assert draft["change"] < -2 * draft["change_stderr"] < 0
    assert math.isclose(
        draft["change"],
        draft["candidate"]["target_agreement"] - draft["reference"]["target_agreement"],
        abs_tol=1e-12,
    )


def test_without_a_draft_there_is_a_note(
    tmp_path: Path, corpus: Corpus, converted: Callable[[str], Path]
) -> None:
    edited = EditableCheckpoint.read(TINY)
    for shard in edited.shards.values():
        for name in [n for n in shard if n.startswith("mtp.")]:
            del shard[name]
    bare = edited.write(tmp_path / "bare")
    assert str(bare) in str(draft_of(bare, TINY, corpus)["note"])
    assert str(bare) in str(draft_of(TINY, bare, corpus)["note"])
    assert "holds no draft stages" in str(draft_of(bare, None, corpus)["note"])
    assert "note" not in draft_of(converted("int4-g128"), TINY, corpus)


def test_too_short_windows_are_refused(corpus: Corpus) -> None:
    short = Corpus([CorpusPart("a", [w[:2] for w in corpus.windows])])
    with pytest.raises(DivergenceError, match="no window has three tokens"):
        draft_of(TINY, None, short)
