"""The checks: small functions from a survey to findings. `CHECKS` is the list; add one there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from itertools import islice

from v4quant_formats.deepseek_v4 import expected_modules
from v4quant_formats.preflight.declared import Refusal, bad_patterns
from v4quant_formats.preflight.storage import FLOATS, Storage, mismatches
from v4quant_formats.preflight.survey import Finding, Module, Survey

Check = Callable[[Survey], Iterable[Finding]]

_REMEDY = "write it with v4quant quantize (--engine for vLLM and SGLang), or correct "
_REMEDY += "quantization_config to what the file holds"
_OTHER = "choose a scheme and format that this engine takes (docs/serving.md)"
_cached_mismatches = lru_cache(maxsize=4096)(
    lambda storage, shape, items: mismatches(storage, shape, dict(items))
)
# Tensors that every release holds in float32.
_WIDE = ("attn_sink", "ape", "gate.bias", "gate.bias_vl")


def is_ignored_draft(survey: Survey, module: Module) -> bool:
    """Whether the engine never looks at this module."""
    return module.name.is_draft and survey.declaration.engine.drafts == "ignored"


def method(survey: Survey) -> Iterator[Finding]:
    """`quant_method` must be one the engine takes."""
    engine, found = survey.declaration.engine, survey.declaration.method
    if found in engine.methods:
        return
    if found in engine.others:
        text = f"quant_method '{found}': {engine.title} accepts it, but it is not modelled here"
        yield Finding("note", "quant-method", "config.json", text, "try it, or read its docs")
        return
    known = ", ".join(m or "none" for m in (*engine.methods, *engine.others))
    text = f"quant_method '{found}' is none that {engine.title} takes for V4 ({known})"
    yield Finding("error", "quant-method", "config.json", text, engine.advice or _REMEDY)


def config_keys(survey: Survey) -> Iterator[Finding]:
    """Keys the engine reads, with the values V4 needs."""
    raw = survey.checkpoint.config
    text = raw.get("text_config", raw)
    for rule in survey.declaration.engine.config:
        if rule.key == "num_hash_layers" and survey.config.v41 is not None:
            continue
        value = text.get(rule.key)
        if value is None or (rule.allowed is not None and value not in rule.allowed):
            wanted = f", expected {rule.allowed[0]!r}" if rule.allowed else ""
            problem = f"'{rule.key}' is {value!r}{wanted}: {rule.consequence}"
            remedy = "restore the key from the release's config.json"
            yield Finding("error", "config-key", "config.json", problem, remedy)
    if raw.get("model_type") not in ("deepseek_v4", "deepseek_v41"):
        problem = f"'model_type' is {raw.get('model_type')!r}; no V4 class is chosen"
        yield Finding("error", "config-key", "config.json", problem, "set it to deepseek_v4")
    if survey.declaration.method == "compressed-tensors" and "expert_dtype" in raw:
        problem = "'expert_dtype' is left beside compressed-tensors; it makes engines look for "
        problem += "native experts"
        yield Finding("warning", "expert-dtype", "config.json", problem, "remove the key")


def patterns(survey: Survey) -> Iterator[Finding]:
    """Targets and ignores must compile, and targets must meet something."""
    declaration = survey.declaration
    if declaration.method != "compressed-tensors":
        return
    for entry in bad_patterns(declaration):
        problem = f"'{entry[:80]}' in quantization_config is no regular expression"
        yield Finding("error", "pattern", "config.json", problem, "correct the pattern")
    if not declaration.groups:
        problem = "compressed-tensors without config_groups declares nothing"
        yield Finding("error", "pattern", "config.json", problem, _REMEDY)


def names(survey: Survey) -> Iterator[Finding]:
    """Tensors the engine has no place for."""
    engine = survey.declaration.engine
    prefixed = [s for s in survey.unknown if s.name.startswith("model.")]
    if prefixed:
        problem = "names start with 'model.', as save_pretrained writes them; only official names "
        problem += "(layers.N..., embed, head) load everywhere"
        remedy = "convert the release itself; never publish what save_pretrained wrote"
        yield Finding("error", "name", prefixed[0].name, problem, remedy, len(prefixed))
    for spec in survey.unknown:
        if not spec.name.startswith("model."):
            problem = f"no V4 release has this tensor; {engine.title} " + (
                "stops with a KeyError" if engine.unknown_names == "error" else "drops it"
            )
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
            yield Finding("error", module.declared.rule, name, module.declared.problem, _REMEDY)
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
            yield Finding("error", rule, f"{name}.{part}", problem, _REMEDY)


def plain(survey: Survey) -> Iterator[Finding]:
    """Modules no engine quantizes: routers, compressors, norms, hyper-connections, vocabulary."""
    for name, module in survey.modules.items():
        own = module.name
        if own.is_linear or is_ignored_draft(survey, module) or own.role in ("vision", "engram"):
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
    engine = survey.declaration.engine
    for name, module in survey.modules.items():
        if not name.endswith("attn.wo_a") or not isinstance(module.declared, Storage):
            continue
        if module.declared.kind not in engine.wo_a and not is_ignored_draft(survey, module):
            problem = f"{module.declared}: the output projection's kernel reads BF16 or block FP8 "
            problem += "only; the file loads and breaks at the first token"
            remedy = "exclude wo_a from the targets and store it BF16 or block FP8"
            yield Finding("error", "wo_a", name, problem, remedy)


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


def nvfp4_scales(survey: Survey) -> Iterator[Finding]:
    """w1 and w3 keep one global scale; every scalar must be a positive number. Reads scalars."""
    scalars = ("weight_scale_2", "input_scale", "weight_global_scale", "input_global_scale")
    checkpoint = survey.checkpoint

    def value(module: Module, part: str) -> float:
        return float(checkpoint.read(f"{module.name.module}.{part}").reshape(-1)[0])

    for name, module in survey.modules.items():
        kinds = [p for p in scalars if module.parts.get(p, ("", (0, 0)))[1] in ((), (1,))]
        partner = survey.modules.get(f"{name[:-1]}3") if name.endswith(".w1") else None
        for part in kinds:
            own = value(module, part)
            if not 0 < own < float("inf"):
                problem = f"is {own}; the experts' output becomes zero or NaN"
                remedy = "calibrate, or quantize again"
                yield Finding("error", "global-scale", f"{name}.{part}", problem, remedy)
            elif partner is not None and partner.parts.get(part, ("", (0, 0)))[1] in ((), (1,)):
                other = value(partner, part)
                if own != other:
                    problem = f"w1 has {own:.6g}, w3 has {other:.6g}; engines keep w1's for both"
                    remedy = "quantize w1 and w3 together (v4quant quantize does)"
                    where = f"{partner.name.module}.{part}"
                    yield Finding("error", "global-scale", where, problem, remedy)


def drafts(survey: Survey) -> Iterator[Finding]:
    """Draft stages promised by config.json but absent, or ignored by the engine."""
    text = survey.checkpoint.config.get("text_config", survey.checkpoint.config)
    promised = bool(text.get("num_nextn_predict_layers")) or "dspark_target_layer_ids" in text
    present = any(m.name.is_draft for m in survey.modules.values())
    title = survey.declaration.engine.title
    if promised and not present:
        problem = "config.json promises draft stages, and the file has none; speculative decoding "
        problem += "cannot start"
        remedy = "set num_nextn_predict_layers to 0 and remove dspark_*, or add the mtp.* shard"
        yield Finding("warning", "drafts", "config.json", problem, remedy)
    if present and survey.declaration.engine.drafts == "ignored":
        problem = f"{title} ignores draft stages (mtp.*)"
        yield Finding("note", "drafts", "mtp.0", problem, "nothing to do")


CHECKS: tuple[Check, ...] = (
    method,
    config_keys,
    patterns,
    names,
    complete,
    stored,
    plain,
    wo_a,
    fused,
    nvfp4_scales,
    drafts,
)
