"""The forward pass against transformers' own DeepseekV4ForCausalLM on the same checkpoints.

transformers knows no activation rounding, so the plain mode is compared, in float32. Token ids are
fixed texts: near-ties of the indexer could flip between the two on unlucky random ones.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from tests.calibration.oracle_loader import OracleParams
from v4quant_calibration.forward.logits import stream_logits
from v4quant_calibration.forward.stream import StreamModel, stream_forward
from v4quant_formats.model_config import load_model_config

ROOT = Path(__file__).parents[3]
TINY_A = ROOT / "tests" / "data" / "tiny-a"
TINY_V4 = ROOT / "v4quant" / "data" / "tiny-v4"


def ours(folder: Path, ids: Tensor) -> Tensor:
    models, config = [StreamModel(OracleParams(folder))], load_model_config(folder)
    streams = stream_forward(models, config, [ids])
    return torch.cat([part.logits[0] for part in stream_logits(models, config, streams)])


def theirs(folder: Path, ids: Tensor) -> Tensor:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, attn_implementation="eager"
        )
        with torch.no_grad():
            return model.float().eval()(input_ids=ids[None], use_cache=False).logits[0]


def compare(folder: Path, ids: Tensor) -> None:
    found, expected = ours(folder, ids), theirs(folder, ids)
    worst = ((found - expected).abs().max() / expected.abs().max()).item()
    print(f"{folder.name}: {ids.numel()} tokens, worst relative difference {worst:.1e}")
    assert worst < 1e-4


def test_random_tiny_model() -> None:
    compare(TINY_A, load_file(TINY_A.parent / "tiny-a.reference.safetensors")["input_ids"][0])


@pytest.mark.parametrize("text", ["heldout-prose", "heldout-code"])
def test_trained_tiny_model(text: str) -> None:
    tokenizer = Tokenizer.from_file(str(TINY_V4 / "tokenizer.json"))
    words = (ROOT / "v4quant" / "data" / "text" / f"{text}.txt").read_text(encoding="utf-8")
    ids = tokenizer.encode(words[:4000], add_special_tokens=False).ids[:399]
    compare(TINY_V4, torch.tensor([0, *ids]))
