"""IQ encoders beside llama.cpp's on the same numbers and weights, and what has no codes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from v4quant_kernels import ggml
from v4quant_kernels.errors import UnsupportedScheme
from v4quant_kernels.ref import ggml_codebooks

VECTORS = [name for name, shape in ggml_codebooks.SHAPES.items() if shape.codebook]

# Weighted error over weighted square of `matrices`, from ggml_quantize_chunk of the llama.cpp in
# llama-cpp-python 0.3.36 (its own bytes, decoded by gguf).
LLAMA_CPP = {
    "iq1_s": {"normal": 0.19760, "heavy": 0.25152, "fp4": 0.18734},
    "iq1_m": {"normal": 0.15421, "heavy": 0.17512, "fp4": 0.14529},
    "iq2_xxs": {"normal": 0.088696, "heavy": 0.14314, "fp4": 0.089002},
    "iq2_xs": {"normal": 0.068474, "heavy": 0.10710, "fp4": 0.067409},
    "iq2_s": {"normal": 0.051486, "heavy": 0.094763, "fp4": 0.052652},
    "iq3_xxs": {"normal": 0.023932, "heavy": 0.032522, "fp4": 0.022828},
    "iq3_s": {"normal": 0.014448, "heavy": 0.023466, "fp4": 0.014297},
    "iq4_nl": {"normal": 0.0049646, "heavy": 0.0071265, "fp4": 0.0039913},
    "iq4_xs": {"normal": 0.0050685, "heavy": 0.0072932, "fp4": 0.0041476},
}


def matrices() -> dict[str, tuple[Tensor, Tensor]]:
    """Numbers float32 [64, 512] and importance [512], the same on every machine."""
    rng = np.random.RandomState(20)
    normal = rng.randn(64, 512)
    heavy = rng.randn(64, 512) * np.abs(rng.randn(64, 512))
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    fp4 = values[rng.randint(0, 8, (64, 512))] * rng.choice([-1, 1], (64, 512)) / 6
    fp4 = (fp4.reshape(64, 16, 32) * 2.0 ** rng.randint(-2, 1, (64, 16, 1))).reshape(64, 512)
    importance = np.exp(rng.randn(512))
    found = {"normal": normal * 0.02, "heavy": heavy * 0.02, "fp4": fp4}
    weights = torch.from_numpy(importance).float()
    return {k: (torch.from_numpy(v).float(), weights) for k, v in found.items()}


def weighted(x: Tensor, back: Tensor, importance: Tensor) -> float:
    """Weighted squared error over the weighted square."""
    weights = importance.double()
    error = ((x - back).double().square() * weights).sum()
    return float(error / (x.double().square() * weights).sum())


@pytest.mark.parametrize("name", list(LLAMA_CPP))
def test_less_weighted_error_than_llama_cpp(name: str) -> None:
    """Never more, and at most 0.92 of it over the three."""
    ratios = []
    for kind, (x, importance) in matrices().items():
        back = ggml.decode(ggml.encode(x, name, importance), name)
        ratios.append(weighted(x, back, importance) / LLAMA_CPP[name][kind])
        assert ratios[-1] <= 1, kind
    assert sum(ratios) / len(ratios) <= 0.92, ratios


@pytest.mark.parametrize("name", VECTORS)
def test_a_block_of_zeros_beside_others_is_zero(name: str, generator: torch.Generator) -> None:
    x = torch.randn(3, 768, generator=generator)
    x[1, 256:512] = 0
    back = ggml.decode(ggml.encode(x, name), name)
    assert bool((back[1, 256:512] == 0).all())
    assert bool((back[1, :256] != 0).all())


@pytest.mark.parametrize("name", VECTORS)
def test_rows_of_other_lengths_name_the_type_that_takes_them(name: str) -> None:
    with pytest.raises(UnsupportedScheme, match="use 'iq4_nl'"):
        ggml.encode(torch.ones(2, 288), name)
    assert ggml.encode(torch.ones(2, 288), "iq4_nl").shape == (2, 9 * 18)


@pytest.mark.parametrize("name", [*VECTORS, "iq4_nl", "iq4_xs"])
def test_steps_below_half_precision(name: str, generator: torch.Generator) -> None:
    """d has no number below 2^-24: smaller weights lose digits, and the smallest all."""
    x = torch.randn(4, 256, generator=generator)
    for size in (2.0**-16, 2.0**-20, 2.0**-26):
        back = ggml.decode(ggml.encode(x * size, name), name)
        assert bool(back.isfinite().all())
        assert bool(((back - x * size).norm(dim=1) <= 1.001 * (x * size).norm(dim=1)).all())
    assert bool((ggml.decode(ggml.encode(x * 2.0**-40, name), name) == 0).all())
