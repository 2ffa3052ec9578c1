"""The plan of an ONNX export: which layers, which stored tensors, how large; from headers alone.

This is not a layout of `quantize`. A layout turns a whole checkpoint into a whole checkpoint, shard
by shard, every tensor accounted for; an ONNX export takes the expert layers somebody asked for,
stacks their experts, and adds arithmetic. It shares the parts (checkpoint, weights, writer,
searches) and not the plan. Sources may therefore be any layout v4quant reads, its own outputs
included.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from v4quant import __version__
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.deepseek_v4 import PROJECTIONS, expert_module
from v4quant_formats.errors import UnsupportedPair, WrongDtype
from v4quant_formats.manifest import ONNX_MANIFEST
from v4quant_formats.model_config import ConfigError, Dimensions, parse_dimensions
from v4quant_formats.module_shapes import module_shape
from v4quant_formats.onnx.decode import TILE
from v4quant_formats.onnx.experts import ExpertBlock, check_block, choose_kernel, expert_specs
from v4quant_formats.onnx.graph import OPSET, require_onnx
from v4quant_formats.onnx.moe import BIAS, GATE, TABLE, MoeLayer
from v4quant_formats.spec import TensorSpec
from v4quant_formats.weights import StoredWeight, find_weight
from v4quant_kernels.scheme import SCHEMES

MANIFEST = ONNX_MANIFEST
INDEXER = "indexer.onnx"


@dataclass(frozen=True)
class DenseTensor:
    """A tensor outside the routed experts: its source, its name in the data file, its form.

    form: f32 (values in float32), i64, bf16 (copied), tiles (E4M3 copied, scales repeated).
    """

    source: StoredWeight
    name: str
    form: str


@dataclass(frozen=True)
class LayerPlan:
    """One layer: its arithmetic, its sources, and the tensors of its data file."""

    layer: MoeLayer
    experts: tuple[tuple[StoredWeight, StoredWeight, StoredWeight], ...]
    dense: tuple[DenseTensor, ...]

    @cached_property
    def outputs(self) -> list[TensorSpec]:
        """Tensors of the data file, without their places."""
        return [*(s for d in self.dense for s in _dense_specs(d)), *expert_specs(self.layer.block)]

    @property
    def bytes_in(self) -> int:
        """Source bytes."""
        weights = [w for expert in self.experts for w in expert] + [d.source for d in self.dense]
        return sum(w.nbytes for w in weights)

    @property
    def bytes_out(self) -> int:
        """Bytes of tensors that will be written."""
        return sum(s.nbytes for s in self.outputs)

    @property
    def data_file(self) -> str:
        """Name of the file that holds the weights."""
        return f"{self.layer.stage}.safetensors"

    @property
    def graphs(self) -> tuple[str, str]:
        """Names of the two graphs; the second, written last, says that the layer is finished."""
        return f"{self.layer.stage}.experts.onnx", f"{self.layer.stage}.moe.onnx"


@dataclass(frozen=True)
class OnnxPlan:
    """The whole export. `digest`: same digest, same bytes."""

    checkpoint: Checkpoint
    config: Dimensions
    scheme: str
    kernel: str
    layers: tuple[LayerPlan, ...]
    stats_digest: str

    @cached_property
    def digest(self) -> str:
        """Identity of the export: source, choices, layers, statistics and tool version."""
        stages = [p.layer.stage for p in self.layers]
        parts = [self.checkpoint.digest(), self.scheme, self.kernel, stages, self.stats_digest]
        return hashlib.sha256(json.dumps([*parts, OPSET, __version__]).encode()).hexdigest()

    @property
    def files(self) -> Iterator[str]:
        """Every file of the finished folder."""
        for plan in self.layers:
            yield from (plan.data_file, *plan.graphs)
        yield from (INDEXER, MANIFEST)


def make_onnx_plan(
    checkpoint: Checkpoint,
    scheme: str,
    layers: Sequence[str] = (),
    kernel: str | None = None,
    stats_digest: str = "",
) -> OnnxPlan:
    """Decide an export. layers: "3" or "mtp.0"; none means every layer of the trunk.

    Raises UnsupportedPair or UnsupportedScheme with what works, ConfigError, MissingTensor or
    WrongDtype naming the tensor, OnnxUnavailable.
    """
    chosen = choose_kernel(scheme, kernel)
    require_onnx()
    where = str(checkpoint.path / "config.json")
    config = parse_dimensions(dict(checkpoint.config), where)
    _check_routing(config, where)
    stages = _stages(checkpoint, config, layers)
    plans = []
    for stage in stages:
        gate = module_shape(config, f"{stage}.ffn.gate")
        assert gate is not None
        block = ExpertBlock(
            gate[0], config.hidden_size, config.moe_intermediate_size,
            config.num_experts_per_tok, config.swiglu_limit, SCHEMES[scheme], chosen,
        )  # fmt: skip
        check_block(block, f"{checkpoint.path}: {stage}")
        plans.append(_layer(checkpoint, config, stage, block))
    return OnnxPlan(checkpoint, config, scheme, chosen, tuple(plans), stats_digest)


def _check_routing(config: Dimensions, where: str) -> None:
    text = config.raw.get("text_config") if config.v41 else config.raw
    assert isinstance(text, dict)
    for key, known in (("scoring_func", "sqrtsoftplus"), ("norm_topk_prob", True)):
        if text.get(key, known) != known:
            raise ConfigError(
                f"{where}: '{key}' is {str(text[key])[:80]!r}; the exported router is that of "
                f"DeepSeek-V4, with {known!r}"
            )


def _stages(checkpoint: Checkpoint, config: Dimensions, layers: Sequence[str]) -> list[str]:
    trunk = [f"layers.{i}" for i in range(config.num_hidden_layers)]
    if not layers:
        return trunk
    stages = [f"layers.{text}" if text.isdecimal() else text for text in layers]
    drafts = sorted({n.split(".ffn.")[0] for n in checkpoint.tensors if n.startswith("mtp.")
                     and ".ffn." in n})  # fmt: skip
    for stage in stages:
        if stage not in trunk and stage not in drafts:
            choice = ", ".join([f"0 to {config.num_hidden_layers - 1}", *drafts])
            raise UnsupportedPair(
                f"{checkpoint.path}: there is no layer '{stage[:80]}' to export; there are {choice}"
            )
    return list(dict.fromkeys(stages))


def _layer(checkpoint: Checkpoint, config: Dimensions, stage: str, block: ExpertBlock) -> LayerPlan:
    hashed = config.facts(stage).hashed
    ffn = f"{stage}.ffn"

    def find(module: str) -> StoredWeight:
        return _find(checkpoint, config, module)

    router = DenseTensor(find(f"{ffn}.gate"), GATE, "f32")
    if hashed:
        choice = DenseTensor(find(f"{ffn}.gate.tid2eid"), TABLE, "i64")
    else:
        choice = DenseTensor(find(f"{ffn}.gate.bias"), BIAS, "f32")
    shared = [_shared(find(f"{ffn}.shared_experts.{p}"), f"shared.{p}") for p in PROJECTIONS]
    experts = []
    for e in range(block.experts):
        w1, w3, w2 = (find(expert_module(stage, e, p)) for p in PROJECTIONS)
        experts.append((w1, w3, w2))
    layer = MoeLayer(stage, block, hashed, config.routed_scaling_factor)
    return LayerPlan(layer, tuple(experts), (router, choice, *shared))


def _find(checkpoint: Checkpoint, config: Dimensions, module: str) -> StoredWeight:
    """How a module is stored, refused when its shape or kind is not what config.json implies."""
    stored = find_weight(checkpoint, module)
    spec = stored.first
    wanted = module_shape(config, module)
    if stored.shape != wanted:
        raise WrongDtype(
            f"{checkpoint.path / spec.file}: '{module}' has shape {list(stored.shape)}, but "
            f"config.json implies {list(wanted or ())}; the files belong to different models"
        )
    kinds = ("I64", "I32") if module.endswith(".tid2eid") else ("F32", "BF16", "F16")
    if stored.scheme is None and spec.dtype not in kinds:
        raise WrongDtype(
            f"{checkpoint.path / spec.file}: '{spec.name}' is {spec.dtype}, expected one of "
            f"{', '.join(kinds)}; the file was written wrongly"
        )
    return stored


def _shared(stored: StoredWeight, name: str) -> DenseTensor:
    scheme = stored.scheme
    if scheme is None:
        bf16 = stored.first.dtype == "BF16"
        return DenseTensor(stored, name, "bf16" if bf16 else "f32")
    tiles = scheme.element == "e4m3" and scheme.block == (TILE, TILE)
    return DenseTensor(stored, name, "tiles" if tiles and not stored.shape[1] % TILE else "f32")


def _dense_specs(dense: DenseTensor) -> list[TensorSpec]:
    shape = dense.source.shape
    if dense.form == "tiles":
        return [
            TensorSpec(f"{dense.name}.codes", "F8_E4M3", shape),
            TensorSpec(f"{dense.name}.scales", "F32", (shape[0], shape[1] // TILE)),
        ]
    return [TensorSpec(dense.name, dense.form.upper(), shape)]
