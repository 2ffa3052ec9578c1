"""inspect, verify, diff: what is true of a checkpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from v4quant.api.arguments import SourceLike, adapter_of, source_of
from v4quant.checks.diff import DiffResult, diff_checkpoints
from v4quant.checks.inspection import Inspection, inspect_checkpoint
from v4quant.checks.kernel_check import check_kernels
from v4quant.checks.verify import VerifyResult, same_files
from v4quant.checks.verify import verify as verify_checkpoint
from v4quant.progress import default_progress
from v4quant.source import Source, open_source
from v4quant_formats.preflight import Preflight, preflight, preflight_onnx
from v4quant_kernels.progress import Progress
from v4quant_kernels.selfcheck import KernelCheck


@dataclass(frozen=True)
class Verification:
    """Outcome of `verify`. values: None where only an engine was asked about. kernels: checks on
    sampled tensors. preflight: what the engine would do."""

    values: VerifyResult | None
    kernels: tuple[KernelCheck, ...] = ()
    preflight: Preflight | None = None

    @property
    def ok(self) -> bool:
        """Whether everything that was asked holds."""
        loads = self.preflight is None or self.preflight.loads
        values = self.values is None or not self.values.findings
        return loads and values and all(check.ok for check in self.kernels)

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        found = None
        if self.preflight is not None:
            found = {**asdict(self.preflight), "loads": self.preflight.loads}
        if self.values is None:
            return found or {}
        table = {**asdict(self.values), "kernels": [asdict(c) for c in self.kernels], "ok": self.ok}
        return table if found is None else {**table, "preflight": found}


def inspect(
    source: SourceLike, *, deep: bool = False, progress: Progress | None = None
) -> Inspection:
    """What checkpoint `source` is: release, layers, bytes by class, defects.

    deep: also read all data (NaN, spreads of scales, tables). Raises what opening raises.
    """
    with open_source(source_of(source), headers_only=not deep) as checkpoint:
        return inspect_checkpoint(checkpoint, default_progress(progress), deep)


def verify(
    out: SourceLike,
    *,
    source: SourceLike | None = None,
    adapter: SourceLike | None = None,
    same_as: SourceLike | None = None,
    kernels: bool = False,
    engine: str | None = None,
    gpu: str | None = None,
    tp: int = 1,
    context: int = 8192,
    progress: Progress | None = None,
) -> Verification:
    """Check converted checkpoint `out`, a folder or a repository: hashes, structure, exactness.

    source: compare every value with it. adapter: the LoRA adapter that was merged into it, a folder
    or repository. same_as: another conversion, whose files must have the same digests by its
    manifest. kernels: run the Triton kernels on sampled tensors. engine: predict from headers
    whether it loads `out`, on `tp` GPUs of kind `gpu` with `context` tokens; without `source`,
    `same_as` and `kernels`, nothing else is checked then.

    Raises ManifestError without a readable v4quant.json, and what opening raises.
    """
    place, shown = source_of(out), default_progress(progress)
    found = _predict(place, engine, tp, context, gpu) if engine is not None else None
    if found is not None and source is None and same_as is None and not kernels:
        return Verification(None, (), found)
    if source is None:
        values = verify_checkpoint(place, None, shown)
    else:
        with open_source(source_of(source), adapter=adapter_of(adapter)) as original:
            values = verify_checkpoint(place, original, shown)
    if same_as is not None:
        others = same_files(place, source_of(same_as))
        values = replace(values, findings=(*values.findings, *others))
    checks = []
    if kernels:
        with open_source(place) as checkpoint:
            checks = check_kernels(checkpoint, shown)
    return Verification(values, tuple(checks), found)


def diff(
    a: SourceLike,
    b: SourceLike,
    *,
    full: bool = False,
    samples: int = 4,
    progress: Progress | None = None,
) -> DiffResult:
    """Compare two checkpoints as numbers, whatever their formats.

    full: every value, not samples. samples: experts of about 64 that are looked at in each stage.
    """
    with open_source(source_of(a)) as left, open_source(source_of(b)) as right:
        return diff_checkpoints(left, right, default_progress(progress), full, samples)


def _predict(out: Source, engine: str, tp: int, context: int, gpu: str | None) -> Preflight:
    if engine == "onnxruntime" and isinstance(out, Path) and any(out.glob("*.onnx")):
        return preflight_onnx(out)
    with open_source(out, headers_only=True) as checkpoint:
        return preflight(checkpoint, engine, tp, context, gpu or "")
