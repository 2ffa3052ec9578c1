"""Checks that read numbers: scalars beside NVFP4 weights, shapes beside packed integers.

They are the only data preflight reads, a few bytes per tensor, fetched shard by shard.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping

from v4quant_formats.preflight.survey import Check, Finding, Module, Survey
from v4quant_formats.spec import TensorSpec

_SCALARS = ("weight_scale_2", "input_scale", "weight_global_scale", "input_global_scale")


def nvfp4_scales(survey: Survey) -> Iterator[Finding]:
    """Every scalar must be a positive number of its size; w1 and w3 keep one global scale."""
    specs = [
        survey.checkpoint.tensors[f"{name}.{part}"]
        for name, module in survey.modules.items()
        for part in _scalars(module)
    ]
    values = {n: struct.unpack("<f", b)[0] for n, b in _first_bytes(survey, specs, 4).items()}
    for name, own in values.items():
        module, _, part = name.rpartition(".")
        if not 0 < own < float("inf"):
            problem = f"is {own}; the experts' output becomes zero or NaN"
            yield _scale(name, problem, "calibrate, or quantize again")
        elif (part == "weight_scale_2" and own > 1) or (part == "weight_global_scale" and own < 1):
            problem = f"is {own:.6g}, which only its reciprocal can be: "
            problem += "ModelOpt multiplies by weight_scale_2, "
            problem += "compressed-tensors divides by weight_global_scale"
            yield _scale(name, problem, "store the reciprocal")
        elif module.endswith(".w1"):
            where = f"{module[:-1]}3.{part}"
            other = values.get(where, own)
            if own != other and 0 < other < float("inf"):
                problem = f"w1 has {own:.6g}, w3 has {other:.6g}; engines keep w1's for both"
                remedy = "quantize w1 and w3 together (v4quant quantize does)"
                yield _scale(where, problem, remedy)


def _scalars(module: Module) -> list[str]:
    """Scalar parts that are there, in the form they should have."""
    found = (p for p in _SCALARS if p in module.parts)
    return [p for p in found if module.parts[p][0] == "F32" and module.parts[p][1] in ((), (1,))]


def _scale(name: str, problem: str, remedy: str) -> Finding:
    return Finding("error", "global-scale", name, problem, remedy)


def packed_shapes(survey: Survey) -> Iterator[Finding]:
    """`weight_shape` says what was packed; the first expert of a stage stands for all."""
    specs = [
        survey.checkpoint.tensors[f"{name}.weight_shape"]
        for name, module in survey.modules.items()
        if module.parts.get("weight_shape") == ("I64", (2,))
        and module.shape is not None
        and module.name.expert in (None, 0)
    ]
    for name, data in _first_bytes(survey, specs, 16).items():
        said = struct.unpack("<qq", data)
        wanted = survey.modules[name.rpartition(".")[0]].shape
        if said != wanted:
            problem = f"says {list(said)}, config.json implies {list(wanted or ())}"
            yield Finding("error", "shape", name, problem, "quantize again, or correct it")


def _first_bytes(survey: Survey, specs: list[TensorSpec], count: int) -> Mapping[str, bytes]:
    """The first bytes of some tensors by name, in the order given."""
    by_file: dict[str, list[TensorSpec]] = {}
    for spec in specs:
        by_file.setdefault(spec.file, []).append(spec)
    found: dict[str, bytes] = {}
    for file, own in by_file.items():
        pieces = survey.checkpoint.shards.slices(file, [s.offset for s in own], count)
        found |= {s.name: piece for s, piece in zip(own, pieces, strict=True)}
    return {s.name: found[s.name] for s in specs}


SCALAR_CHECKS: tuple[Check, ...] = (nvfp4_scales, packed_shapes)
