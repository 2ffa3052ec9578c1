"""v4quant: released DeepSeek-V4 weights to a checkpoint you can serve, with proof of its cost.

    import v4quant
    v4quant.quantize("DeepSeek-V4-Flash", "out", scheme="int4-g32")
    print(v4quant.verify("out", source="DeepSeek-V4-Flash").ok)

Names are loaded when they are first used: importing the package costs nothing.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

import v4quant_kernels  # noqa: F401  settles OpenMP before anything loads torch

__version__ = "0.1.0"

# Warnings go where a program sends these logs, and nowhere unless it does.
for _name in (__name__, "v4quant_calibration", "v4quant_formats", "v4quant_kernels"):
    logging.getLogger(_name).addHandler(logging.NullHandler())

if TYPE_CHECKING:
    from v4quant.api.allocation import AllocationResult, allocate
    from v4quant.api.calibration import CalibrationResult, calibrate
    from v4quant.api.chat import EncodedChat, encode
    from v4quant.api.checks import Verification, diff, inspect, verify
    from v4quant.api.conversion import PlannedConversion, make_recipe, plan_quantize, quantize
    from v4quant.api.evaluation import evaluate
    from v4quant.api.onnx import PlannedExport, export_onnx, plan_export_onnx
    from v4quant.api.planning import PlanResult, plan
    from v4quant.api.publishing import PlannedPush, plan_push, push
    from v4quant.checks.diff import DiffResult
    from v4quant.checks.inspection import Inspection
    from v4quant.conversion.job import JobResult
    from v4quant.evaluation.result import Evaluation
    from v4quant.pipeline.costs import PlannedRun, plan_run
    from v4quant.pipeline.results import RunResult
    from v4quant.pipeline.run import run
    from v4quant.progress import BarProgress
    from v4quant.publishing.publisher import PushResult
    from v4quant.recipe import Recipe
    from v4quant_formats.checkpoint import Checkpoint
    from v4quant_formats.opening import open_checkpoint
    from v4quant_kernels.errors import V4QuantError
    from v4quant_kernels.progress import Progress, SilentProgress

_HOMES = {
    "AllocationResult": "v4quant.api.allocation",
    "BarProgress": "v4quant.progress",
    "CalibrationResult": "v4quant.api.calibration",
    "Checkpoint": "v4quant_formats.checkpoint",
    "DiffResult": "v4quant.checks.diff",
    "EncodedChat": "v4quant.api.chat",
    "Evaluation": "v4quant.evaluation.result",
    "Inspection": "v4quant.checks.inspection",
    "JobResult": "v4quant.conversion.job",
    "PlanResult": "v4quant.api.planning",
    "PlannedConversion": "v4quant.api.conversion",
    "PlannedExport": "v4quant.api.onnx",
    "PlannedPush": "v4quant.api.publishing",
    "PlannedRun": "v4quant.pipeline.costs",
    "Progress": "v4quant_kernels.progress",
    "PushResult": "v4quant.publishing.publisher",
    "Recipe": "v4quant.recipe",
    "RunResult": "v4quant.pipeline.results",
    "SilentProgress": "v4quant_kernels.progress",
    "V4QuantError": "v4quant_kernels.errors",
    "Verification": "v4quant.api.checks",
    "allocate": "v4quant.api.allocation",
    "calibrate": "v4quant.api.calibration",
    "diff": "v4quant.api.checks",
    "encode": "v4quant.api.chat",
    "evaluate": "v4quant.api.evaluation",
    "export_onnx": "v4quant.api.onnx",
    "inspect": "v4quant.api.checks",
    "make_recipe": "v4quant.api.conversion",
    "open_checkpoint": "v4quant_formats.opening",
    "plan": "v4quant.api.planning",
    "plan_export_onnx": "v4quant.api.onnx",
    "plan_push": "v4quant.api.publishing",
    "plan_quantize": "v4quant.api.conversion",
    "plan_run": "v4quant.pipeline.costs",
    "push": "v4quant.api.publishing",
    "quantize": "v4quant.api.conversion",
    "run": "v4quant.pipeline.run",
    "verify": "v4quant.api.checks",
}

__all__ = [
    "AllocationResult",
    "BarProgress",
    "CalibrationResult",
    "Checkpoint",
    "DiffResult",
    "EncodedChat",
    "Evaluation",
    "Inspection",
    "JobResult",
    "PlanResult",
    "PlannedConversion",
    "PlannedExport",
    "PlannedPush",
    "PlannedRun",
    "Progress",
    "PushResult",
    "Recipe",
    "RunResult",
    "SilentProgress",
    "V4QuantError",
    "Verification",
    "allocate",
    "calibrate",
    "diff",
    "encode",
    "evaluate",
    "export_onnx",
    "inspect",
    "make_recipe",
    "open_checkpoint",
    "plan",
    "plan_export_onnx",
    "plan_push",
    "plan_quantize",
    "plan_run",
    "push",
    "quantize",
    "run",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Load a public name when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'v4quant' has no attribute '{name}'")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Public names, for completion in a notebook."""
    return sorted({*globals(), *__all__})
