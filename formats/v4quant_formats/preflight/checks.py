"""The checks: small functions from a survey to findings. `CHECKS` is the list; add one there.

Those of config.json alone are in `config_checks.py`, those of stored numbers in `scalar_checks.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import islice

from v4quant_formats.deepseek_v4 import expected_modules
from v4quant_formats.preflight.config_checks import CONFIG_CHECKS, REMEDY
from v4quant_formats.preflight.declared import Refusal
from v4quant_formats.preflight.scalar_checks import SCALAR_CHECKS
from v4quant_formats.preflight.storage import FLOATS, Storage, mismatches
from v4quant_formats.preflight.survey import Check, Finding, Module, Survey
from v4quant_formats.preflight.written_checks import WRITTEN_CHECKS

_OTHER = "choose a scheme and format that this engine takes (docs/serving.md)"
_cached_mismatches = lru_cache(maxsize=4096)(
    lambda storage, shape, items: mismatches(storage, shape, dict(items))
)
# Tensors that every release holds in float32.
_WIDE = ("attn_sink", "ape", "gate.bias", "gate.bias_vl")
# Stored by every layout as the release has them, whatever their formats.
_AS_RELEASED = ("vision", "engram", "engram tables")


def is_ignored_draft(survey: Survey, module: Module) -> bool:
    """Whether the engine never looks at this module."""
    return module.name.is_draft and survey.declaration.engine.drafts == "ignored"


def names(survey: Survey) -> Iterator[Finding]:
    """Tensors the engine has no place for."""
    engine = survey.declaration.engine
    for spec in survey.unknown:
        problem = f"no V4 release has this tensor; {engine.title} "
        problem += "stops with a KeyError" if engine.unknown_names == "error" else "drops it"
        remedy = "remove the tensor or correct its name"
        yield Finding(engine.unknown_names, "name", spec.name, problem, remedy)


def complete(survey: Survey) -> Iterator[Finding]:
    """Every module config.json implies must be there, for the stages that are."""
    expected = expected_modules(survey.config, survey.checkpoint.tensors)
    absent = (m for m in expected if m not in survey.modules)
    for module in islice(absent, 1000):
        if not (module.startswith("mtp.") and survey.declaration.engine.drafts == "ignored"):
            problem = "config.json implies this module, but it has no tensor"
            yield Finding("error", "missing", module, problem, "fetch or write the missing shard")
    for name, found in survey.modules.items():
        kind, _, number = found.name.stage.partition(".")
        if kind == "layers" and int(number) >= survey.config.num_hidden_layers:
            problem = "this layer is beyond config.json's num_hidden_layers"
            remedy = "use the config.json of this checkpoint"
            yield Finding("error", "extra-layer", name, problem, remedy)


def stored(survey: Survey) -> Iterator[Finding]:
    """Linear modules: what the file holds against what the engine builds."""
    engine = survey.declaration.engine
    for name, module in survey.modules.items():
        if module.declared is None or is_ignored_draft(survey, module):
            continue
        if isinstance(module.declared, Refusal):
            yield Finding("error", module.declared.rule, name, module.declared.problem, REMEDY)
            continue
        takes = engine.experts if module.name.expert is not None else engine.dense
        kind = module.declared.kind
        if survey.declaration.method in engine.methods and kind not in takes:
            works = ", ".join(str(Storage(k)) for k in takes)
            reason = engine.refusals.get(kind, f"it takes {works}")
            problem = f"{engine.title} does not take {module.declared} here: {reason}"
            yield Finding("error", "unsupported", name, problem, _OTHER)
            continue
        if module.shape is None:
            continue
        items = tuple(module.parts.items())
        for rule, part, problem in _cached_mismatches(module.declared, module.shape, items):
            yield Finding("error", rule, f"{name}.{part}", problem, REMEDY)


def plain(survey: Survey) -> Iterator[Finding]:
    """Modules no engine quantizes: routers, compressors, norms, hyper-connections, vocabulary."""
    for name, module in survey.modules.items():
        own = module.name
        if own.is_linear or is_ignored_draft(survey, module) or own.role in _AS_RELEASED:
            continue
        if own.module.endswith(".tid2eid"):
            allowed: tuple[str, ...] = ("I64", "I32")
        else:
            allowed = FLOATS
        dtype, shape = next(iter(module.parts.values()))
        if len(module.parts) > 1 or dtype not in allowed:
            has = ", ".join(f"{p or 'tensor'} {d}" for p, (d, _) in module.parts.items())
            problem = f"engines build this module unquantized; the file has {has}"
            remedy = "keep it as the release has it"
            yield Finding("error", "forbidden", name, problem, remedy)
        elif module.shape is not None and shape != module.shape:
            problem = f"shape is {list(shape)}, config.json implies {list(module.shape)}"
            yield Finding("error", "shape", name, problem, "use the config.json of this checkpoint")
        elif dtype in ("BF16", "F16") and (own.role == "hyper-connection" or name.endswith(_WIDE)):
            problem = f"stored as {dtype}; every release holds it in F32, and the loss is silent"
            yield Finding("warning", "precision", name, problem, "carry the release's tensor")


def wo_a(survey: Survey) -> Iterator[Finding]:
    """The output projection is read by a kernel of its own, which takes few forms."""
    engine, release = survey.declaration.engine, survey.declaration.release
    for name, module in survey.modules.items():
        declared = module.declared
        if not name.endswith("attn.wo_a") or not isinstance(declared, Storage):
            continue
        if is_ignored_draft(survey, module):
            continue
        remedy = "exclude wo_a from the targets and store it BF16"
        if declared.kind not in engine.wo_a:
            problem = f"{declared}: the output projection's kernel reads BF16 or block FP8 "
            problem += "only; the file loads and breaks at the first token"
            yield Finding("error", "wo_a", name, problem, f"{remedy} or block FP8")
        elif release == "v41" and engine.strict_wo_a and _breaks_wo_a(survey, declared):
            tile = "x".join(map(str, declared.tile))
            problem = f"{declared} with {tile} tiles: beside other experts than FP4 the output "
            problem += "projection's kernel reads tiles of 128; the file loads and breaks at the "
            problem += "first token"
            yield Finding("error", "wo_a", name, problem, remedy)


def _breaks_wo_a(survey: Survey, declared: Storage) -> bool:
    """vLLM's class for V4.1: 32x32 tiles are read as MXFP8 beside FP4 experts, else not at all."""
    if declared.kind == "ct-fp8-block":
        return declared.tile not in ((1, 32), (128, 128))
    fp4 = survey.declaration.expert_dtype == "fp4"
    return declared.kind == "fp8" and declared.tile == (32, 32) and not fp4


def fused(survey: Survey) -> Iterator[Finding]:
    """Engines fuse wq_a with wkv and w1 with w3: both halves must be declared and stored alike."""
    for a, b in survey.pairs():
        if is_ignored_draft(survey, a):
            continue
        if a.declared != b.declared:
            first, second = (m.name.module.rpartition(".")[2] for m in (a, b))
            problem = f"{first} is declared {_say(a)}, {second} {_say(b)}; "
            problem += "engines build both as one"
            remedy = "let targets and ignore name both halves or neither"
            yield Finding("error", "fused-pair", b.name.module, problem, remedy)


def _say(module: Module) -> str:
    declared = module.declared
    return declared.problem if isinstance(declared, Refusal) else str(declared)


CHECKS: tuple[Check, ...] = (
    *CONFIG_CHECKS,
    names,
    complete,
    stored,
    plain,
    wo_a,
    fused,
    *SCALAR_CHECKS,
    *WRITTEN_CHECKS,
)
