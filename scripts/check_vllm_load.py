"""Load checkpoints with vLLM's own DeepSeek-V4 model class and weight loader, on a CPU.

    VLLM_PY=folder python scripts/check_vllm_load.py CHECKPOINT... [--sm 90 --sm 100] [--tp 2]

Says for every checkpoint and GPU generation how many parameters the model has, how many the loader
filled, which quantization methods vLLM chose for how many layers, and how many bytes the first of
`--tp` GPUs holds. Exit code 3 when something did not load. It shows that names, shapes, dtypes,
quantization_config and cuts are what vLLM expects; it computes nothing.

vLLM cannot be imported without a GPU, so a GPU is pretended. `VLLM_PY` is a folder that holds the
Python files of the vLLM wheel (`unzip vllm-*.whl '*.py' '*.dist-info/*' -d folder`). The
interpreter needs torch and what vLLM imports at start, compiled packages and torchvision apart:

- compiled modules are replaced by empty ones, and the few operators asked at construction by
  plain functions;
- the platform is a CUDA platform without NVML, of the wanted capability, whose tensors are on
  the CPU;
- the sparse indexer's workspace, which needs a real device, is left out;
- what would re-pack weights for kernels after loading is skipped.

Each load runs in a process of its own, because vLLM keeps its configuration in globals.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

COMPILED = (
    "_C",
    "_C_stable_libtorch",
    "_moe_C",
    "_moe_C_stable_libtorch",
    "_flashmla_C",
    "_flashmla_extension_C",
    "_deepselect_C",
    "_qutlass_C",
    "cumem_allocator",
    "spinloop",
    "fs_io_C",
)
MEMORY = 80 * 2**30
COMMUNICATOR = (
    "vllm.distributed.device_communicators.base_device_communicator.DeviceCommunicatorBase"
)


class AnyModule(types.ModuleType):
    """A package that has every attribute."""

    __path__ = []  # noqa: RUF012  what makes a module a package; never written

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=f"{self.__name__}.{name}")


class NoWait:
    """A CUDA event or stream that is always done."""

    def __init__(self, *_: Any, **__: Any) -> None:
        """Take anything."""

    def record(self, *_: Any, **__: Any) -> None:
        """Do nothing."""

    wait = synchronize = wait_stream = record

    def query(self) -> bool:
        """Done."""
        return True


def pretend_cuda(major: int, minor: int) -> None:
    """Replace what torch.cuda would answer about the device."""
    import torch

    facts = types.SimpleNamespace(
        multi_processor_count=132,
        total_memory=MEMORY,
        major=major,
        minor=minor,
        name="pretended",
        shared_memory_per_block_optin=227 * 1024,
    )
    cuda: Any = torch.cuda
    cuda.Event = cuda.Stream = NoWait
    cuda.get_device_capability = lambda *_, **__: (major, minor)
    cuda.get_device_properties = lambda *_, **__: facts
    cuda.current_device = lambda: 0
    cuda.device_count = lambda: 64
    torch.accelerator.current_device_index = lambda: 0


def pretend_operators() -> None:
    """Empty compiled modules, and the operators that are asked what they support."""
    import torch

    vllm = importlib.import_module("vllm")
    for name in COMPILED:
        module = types.ModuleType(f"vllm.{name}")
        sys.modules[module.__name__] = module
        setattr(vllm, name, module)
    sys.modules["vllm.vllm_flash_attn"] = AnyModule("vllm.vllm_flash_attn")
    operators: Any = torch.ops._C
    operators.cutlass_scaled_mm_supports_fp8 = lambda sm: sm >= 89
    operators.cutlass_scaled_mm_supports_block_fp8 = lambda sm: sm >= 90
    operators.cutlass_sparse_scaled_mm_supported = lambda sm: sm >= 90
    operators.cutlass_group_gemm_supported = lambda sm: 90 <= sm < 120
    operators.cutlass_scaled_mm_supports_fp4 = lambda sm: sm >= 100
    operators.mxfp4_experts_quant_supported = lambda sm: sm >= 100
    operators.silu_and_mul = operators.silu_and_mul_with_clamp = lambda *_: None


def pretend_platform(major: int, minor: int) -> None:
    """Install a CUDA platform of the wanted capability whose device is the CPU."""
    platforms: Any = importlib.import_module("vllm.platforms")
    base = importlib.import_module("vllm.platforms.cuda").NonNvmlCudaPlatform
    capability = importlib.import_module("vllm.platforms.interface").DeviceCapability

    def has(_: Any, wanted: Any, device_id: int = 0) -> bool:
        del device_id
        pair = wanted if isinstance(wanted, tuple) else divmod(wanted, 10)
        return (major, minor) >= tuple(pair)

    body = {
        "device_type": "cpu",
        "get_device_capability": classmethod(lambda _, device_id=0: capability(major, minor)),
        "has_device_capability": classmethod(has),
        "get_device_name": classmethod(lambda _, device_id=0: "pretended"),
        "get_device_total_memory": classmethod(lambda _, device_id=0: MEMORY),
        "get_device_communicator_cls": classmethod(lambda _: COMMUNICATOR),
        "log_warnings": classmethod(lambda _: None),
        "num_compute_units": classmethod(lambda _, device_id=0: 132),
    }
    platforms._current_platform = type("Pretended", (base,), body)()


def skip_indexer_workspace() -> None:
    """The sparse indexer asks a real device for buffers that loading does not need."""
    import torch

    indexer = importlib.import_module("vllm.model_executor.layers.sparse_attn_indexer")

    def build(self: Any, *_: Any, **__: Any) -> None:
        torch.nn.Module.__init__(self)

    indexer.SparseAttnIndexer.__init__ = build


def inspect_here() -> None:
    """vLLM looks at model classes in a fresh process, where nothing would be pretended."""
    registry = importlib.import_module("vllm.model_executor.models.registry")
    vars(registry)["_run_in_subprocess"] = lambda function: function()


def load(folder: Path, tp: int, rank: int, port: int) -> dict[str, Any]:
    """Build the model for a checkpoint's config and run the loader over its files.

    Of `tp` processes that meet at `port` this is number `rank`.
    """
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    config = EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=512,
        dtype="bfloat16",
        max_num_seqs=2,
        max_num_batched_tokens=512,
        kv_cache_dtype="fp8",
        engram_config={"cpu_offload": False},  # the default wants memory that a GPU driver pinned
        tensor_parallel_size=tp,
        distributed_executor_backend="mp" if tp > 1 else None,
    ).create_engine_config()
    with set_current_vllm_config(config):
        init_distributed_environment(tp, rank, f"tcp://127.0.0.1:{port}", 0, backend="gloo")
        ensure_model_parallel_initialized(tp, 1)
        with set_default_torch_dtype(torch.bfloat16):
            model = initialize_model(vllm_config=config)
        wanted = set(dict(model.named_parameters()))
        loader = get_model_loader(config.load_config)
        model.process_weights_after_loading = lambda *_, **__: None
        filled = model.load_weights(loader.get_all_weights(config.model_config, model))
    return {
        "quantization": config.model_config.quantization,
        "parameters": len(wanted),
        "unfilled": sorted(wanted - set(filled)),
        "bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "methods": methods(model),
    }


def methods(model: Any) -> dict[str, str]:
    """Which quantization method, scheme and kernel family each module got."""
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if method is None or "layers." not in name:
            continue
        parts = [type(method).__name__]
        if scheme := getattr(module, "scheme", None):
            parts.append(type(scheme).__name__)
        keys = ("wna16_backend", "nvfp4_backend", "mxfp4_backend", "fp8_backend", "mxfp8_backend")
        parts += [str(getattr(method, k)) for k in keys if hasattr(method, k)]
        if hasattr(method, "num_bits"):
            parts.append(f"{method.num_bits} bits in groups of {method.group_size}")
        found[name] = " ".join(parts)
    return found


def child(folder: Path, sm: int, tp: int, rank: int, port: int) -> dict[str, Any]:
    """One load in this process, or one rank of it."""
    major, minor = divmod(sm, 10)
    sys.path.insert(0, os.environ["VLLM_PY"])
    pretend_cuda(major, minor)
    pretend_operators()
    pretend_platform(major, minor)
    inspect_here()
    skip_indexer_workspace()
    return load(folder, tp, rank, port)


def run(folder: Path, sm: int, tp: int) -> dict[str, Any]:
    """One load, in a fresh process per rank; the first's result, or the last line of its error."""
    cache = f"/tmp/vllm-load-check-{os.getpid()}"
    port = 20000 + (os.getpid() + sm) % 20000
    command = [sys.executable, __file__, str(folder), "--sm", str(sm), "--tp", str(tp)]
    ranks = [
        subprocess.Popen(
            [*command, "--child", str(rank), "--port", str(port)],
            env={"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CACHE_ROOT": cache, **os.environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(tp)
    ]
    outputs = [process.communicate() for process in ranks]
    for line in reversed(outputs[0][0].splitlines()):
        if line.startswith("{"):
            result: dict[str, Any] = json.loads(line)
            return result
    return {"error": (outputs[0][1].strip().splitlines() or ["no output"])[-1]}


def main() -> int:
    """Load every checkpoint for every GPU generation and print what was seen."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("checkpoint", nargs="+", type=Path)
    parser.add_argument("--sm", action="append", type=int, help="90, 100, ... (default both)")
    parser.add_argument("--tp", type=int, default=1, help="GPUs to split it over (default 1)")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if "VLLM_PY" not in os.environ:
        parser.error("VLLM_PY must name the folder with vLLM's Python files")
    if args.child is not None:
        print(json.dumps(child(args.checkpoint[0], args.sm[0], args.tp, args.child, args.port)))
        return 0
    failed = False
    for folder in args.checkpoint:
        for sm in args.sm or (90, 100):
            seen = run(folder, sm, args.tp)
            bad = "error" in seen or bool(seen["unfilled"])
            failed |= bad
            print(f"{folder.name} sm{sm}: {'FAILED' if bad else 'ok'} {summary(seen)}", flush=True)
    return 3 if failed else 0


def summary(seen: dict[str, Any]) -> str:
    """One line of what was seen."""
    if "error" in seen:
        return str(seen["error"])
    filled = seen["parameters"] - len(seen["unfilled"])
    kinds = Counter(
        f"{'experts' if name.endswith('experts') else 'dense'}: {kind}"
        for name, kind in seen["methods"].items()
    )
    text = "; ".join(f"{count} x {kind}" for kind, count in kinds.most_common())
    first = f", without {', '.join(seen['unfilled'][:3])}" if seen["unfilled"] else ""
    loaded = f"{filled}/{seen['parameters']} parameters{first}, {seen['bytes']:,} bytes"
    return f"{loaded}; {seen['quantization']}; {text}"


if __name__ == "__main__":
    sys.exit(main())
