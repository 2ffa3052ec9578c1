"""Near names: what somebody probably meant, and silence where nothing is near."""

from __future__ import annotations

import random
import time

import pytest

from v4quant_kernels.near_names import did_you_mean, near_names, not_one_of
from v4quant_kernels.scheme import SCHEMES


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("q4_k_m", ["q4_k"]), ("Q4_K", ["q4_k"]), ("iq2xxs", ["iq2_xxs"]), ("q5ks", ["q5_k"]),
        ("int4", ["int4-g32", "int4-g64", "int4-g128"]), ("INT4_G128", ["int4-g128"]),
        ("mxpf4", ["mxfp4", "mxfp8"]), ("nvfp", ["nvfp4"]), ("w4a16", []), ("", []), ("-_", []),
    ],
)  # fmt: skip
def test_names_as_other_tools_write_them(written: str, meant: list[str]) -> None:
    assert near_names(written, SCHEMES) == meant


def test_a_letter_swapped_lost_or_doubled_is_found() -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    chance = random.Random(seed)
    known = ["quantize", "compressed-tensors", "transformers", "deepseek", "modelopt"]
    for _ in range(50):
        name = chance.choice(known)
        at = chance.randrange(1, len(name) - 1)
        instead = chance.choice(("", name[at] * 2, "q"))
        wrong = name[:at] + instead + name[at + 1 :]
        assert near_names(wrong, known)[0] == name, wrong


def test_what_is_said() -> None:
    assert did_you_mean("vLLM", ["neutral", "vllm"]) == "did you mean vllm? "
    assert did_you_mean("x", ["neutral", "vllm"]) == ""
    assert not_one_of("vLLM", ["neutral", "vllm"]) == (
        "'vLLM' is not one of neutral, vllm; did you mean vllm?"
    )
    assert not_one_of("zz", ["a"], " in gguf") == "'zz' in gguf is not one of a"


def test_a_name_of_a_megabyte_takes_no_time() -> None:
    began = time.process_time()
    near_names("q4_k" * 2**18, SCHEMES)
    assert time.process_time() - began < 1
