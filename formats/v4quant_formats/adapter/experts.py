"""LoRA on experts that transformers keeps in one parameter: PEFT's `target_parameters`.

`mlp.experts` has gate_up_proj [E, 2I, H] (rows of gate, then of up) and down_proj [E, H, I]. Of one
such parameter [E, m, n] PEFT keeps a single pair for all experts: expert e has the rows
e*r .. (e+1)*r - 1 of lora_A and every E-th column of lora_B from the e-th on. PEFT wraps one
parameter in the other's wrapper, so one pair is called `experts`, the other `experts.base_layer`,
in no fixed order: the shapes tell which is which.

They also tell the order. Since 0.19 PEFT has lora_A [r*E, n] and lora_B [m, r*E], and adds B_e A_e.
Before, it took m for the inputs: lora_A [r*E, m], lora_B [n, r*E], and it added (B_e A_e)^T. Where
H = 2I, as in Flash, gate_up_proj's shapes fit both; then the adapter's other pairs tell, else the
version that its config names.

Source: peft.tuners.lora.layer.ParamWrapper of 0.17.1, 0.18.0, 0.19.1 and 0.21.2.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from v4quant_formats.adapter.factors import Factor, Product
from v4quant_formats.adapter.settings import AdapterError, Settings
from v4quant_formats.deepseek_v4 import expert_module
from v4quant_formats.errors import WrongDtype
from v4quant_formats.model_config import Dimensions
from v4quant_formats.spec import TensorSpec

_SWAPPED_SINCE = (0, 19)
_PARAMETERS = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}


@dataclass(frozen=True)
class FusedPair:
    """lora_A and lora_B of all experts of a stage. name: the module's in PEFT, `…mlp.experts`."""

    stage: str
    name: str
    a: TensorSpec
    b: TensorSpec


def expert_products(
    pairs: Mapping[str, FusedPair], dimensions: Dimensions, settings: Settings
) -> Iterator[tuple[str, Product]]:
    """(official module, what is added) of every expert's matrices.

    Raises WrongDtype for shapes that are no parameter's of this model, AdapterError where nothing
    tells their order.
    """
    fits = {key: _fits(pair, dimensions) for key, pair in pairs.items()}
    told = {next(iter(found)) for found in fits.values() if len(found) == 1}
    if len(told) > 1:
        raise AdapterError(
            f"{settings.path.parent}: its pairs of fused experts count inputs and outputs in two "
            "orders; no version of PEFT writes that"
        )
    for key, found in fits.items():
        turned = next(iter(told)) if told else _by_version(pairs[key], settings)
        yield from _of_pair(pairs[key], found[turned], turned, dimensions, settings)


def _fits(pair: FusedPair, dimensions: Dimensions) -> dict[bool, str]:
    """The parameter these shapes mean in each order: {turned: name}."""
    inputs, outputs = pair.a.shape[1], pair.b.shape[0]
    shapes = {
        name: (len(parts) * dimensions.moe_intermediate_size, dimensions.hidden_size)
        for name, parts in _PARAMETERS.items()
    }
    shapes["down_proj"] = shapes["down_proj"][::-1]
    fits = {False: (outputs, inputs), True: (inputs, outputs)}
    found = {t: n for t, shape in fits.items() for n, s in shapes.items() if s == shape}
    experts = dimensions.n_routed_experts
    if not found or pair.a.shape[0] != pair.b.shape[1] or pair.a.shape[0] % experts:
        raise WrongDtype(
            f"{pair.a.file}: '{pair.a}' and '{pair.b}' fit no fused parameter of {experts} experts "
            f"{list(shapes.values())}; the adapter is another model's"
        )
    return found


def _by_version(pair: FusedPair, settings: Settings) -> bool:
    version = settings.peft_version
    if version is None:
        raise AdapterError(
            f"{settings.path}: '{pair.name}' fits this model with inputs and outputs in either "
            "order, and no peft_version tells which PEFT wrote it; merge it with PEFT"
        )
    return version < _SWAPPED_SINCE


def _of_pair(
    pair: FusedPair, parameter: str, turned: bool, dimensions: Dimensions, settings: Settings
) -> Iterator[tuple[str, Product]]:
    experts, width = dimensions.n_routed_experts, pair.a.shape[0]
    rank = width // experts
    scaling = settings.scaling(f"{pair.name}.{parameter}", rank)
    projections = _PARAMETERS[parameter]
    outputs = (pair.a.shape[1] if turned else pair.b.shape[0]) // len(projections)
    for number in range(experts * len(projections)):
        expert, half = divmod(number, len(projections))
        own, every = range(expert * rank, (expert + 1) * rank), range(expert, width, experts)
        part = range(half * outputs, (half + 1) * outputs)
        if turned:
            left = Factor(pair.a, own, part, turned=True)
            right = Factor(pair.b, range(pair.b.shape[0]), every, turned=True)
        else:
            left = Factor(pair.b, part, every)
            right = Factor(pair.a, own, range(pair.a.shape[1]))
        yield expert_module(pair.stage, expert, projections[half]), Product(left, right, scaling)
