"""Layout: what a container's files look like, as pure functions of schemes and shapes.

A layout answers four questions: which tensors an expert's matrix becomes (names and shapes before
any data is read, data afterwards), what happens to the dense FP8 matrices, and what config.json
says. The planner and the job know layouts only through this interface; the table of layouts is in
layouts.py.

One format may look different for different engines: where they want the same weights under other
names, a layout has *variants*, each a complete layout of its own. The neutral one is what most
engines load.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from v4quant_formats.deepseek_v4 import TensorName
from v4quant_formats.layouts.choices import NEUTRAL
from v4quant_formats.model_config import Dimensions
from v4quant_formats.spec import TensorSpec
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.scheme import SCHEMES, Scheme

if TYPE_CHECKING:
    from torch import Tensor

# Suffix -> (safetensors dtype, shape).
Parts = dict[str, tuple[str, tuple[int, ...]]]

# copy: byte for byte (a Base release's float32 powers of two become the same numbers in E8M0).
# bf16: dequantized FP8, exact (4 significant bits fit in 8). f32_scale: codes byte for byte, E8M0
# scales widened to float32 powers of two, exact. mxfp8: codes byte for byte, a tile's scale
# repeated for each of its rows, exact.
DenseRule = Literal["copy", "bf16", "f32_scale", "mxfp8"]


@dataclass(frozen=True)
class Layout:
    """A container format for converted checkpoints.

    expert_parts(scheme, (N, K)) -> suffix -> (dtype, shape) of one expert matrix.
    expert_tensors(q, input_amax) -> suffix -> data for those suffixes; `input_amax` is the largest
        input magnitude the matrix must expect, for layouts that store an activation scale.
    dense(scheme, name, config) -> what happens to an FP8 matrix outside the routed experts.
    config(raw, scheme, kept) -> the output's config.json object, from the source's; `kept` are
        stages whose experts stay in the source format.
    stores_input_scale: whether `expert_tensors` uses `input_amax` (0 is passed otherwise).
    can_keep: whether the format can say that some stages' experts are in the source format.
    mixes: what may have a scheme of its own: every "projection" of a layer, a "layer" (its experts
        alike), or nothing ("").
    mixed_config(raw, stage -> scheme) -> as `config`, where stages' experts differ.
    keeps_drafts: draft stages' experts stay in the source's MXFP4.
    dense_scale: the part name of dense FP8 scales.
    engines: what loads it, for people. engine: which variant this is.
    variants: engine -> the layout for that engine, where it differs from this one.
    refuses(engine, scheme) -> why that engine cannot load this scheme in this format, and what it
        can load instead; "" where it can.
    dense_choices() -> what a recipe's `dense` may choose; none where the format decides.
    table_choices() -> what a recipe's `engram` may choose, the exact one first; none where the
        tables stay byte for byte.
    plain(name, spec) -> the dtype a tensor outside all matrices is stored in, a wider one or its
        own; None: all are copied.
    leaves_out(name, config) -> why the format has no place for a tensor, or None.
    check(config, draft stages) raises UnsupportedPair for releases the format cannot hold.
    index: the file, written last, that makes a folder a checkpoint; "" where the manifest is last.
    """

    name: str
    expert_parts: Callable[[Scheme, tuple[int, int]], Parts]
    expert_tensors: Callable[[QTensor, float], dict[str, Tensor]]
    dense: Callable[[Scheme, TensorName, Dimensions], DenseRule]
    config: Callable[[Mapping[str, Any], Scheme, Sequence[str]], dict[str, Any]]
    engines: str
    serve: str
    can_keep: bool = False
    mixes: Literal["", "layer", "projection"] = ""
    mixed_config: Callable[[Mapping[str, Any], Mapping[str, Scheme]], dict[str, Any]] | None = None
    stores_input_scale: bool = False
    keeps_drafts: bool = False
    dense_scale: str = "scale"
    engine: str = NEUTRAL
    variants: Mapping[str, Layout] = field(default_factory=dict)
    refuses: Callable[[str, Scheme], str] = lambda engine, scheme: ""
    dense_choices: Callable[[], tuple[str, ...]] = tuple
    table_choices: Callable[[], tuple[str, ...]] = tuple
    plain: Callable[[TensorName, TensorSpec], str] | None = None
    leaves_out: Callable[[TensorName, Dimensions], str | None] = lambda name, config: None
    check: Callable[[Dimensions, Sequence[str]], None] = lambda config, drafts: None
    index: str = "model.safetensors.index.json"

    @property
    def schemes(self) -> tuple[str, ...]:
        """Names of the schemes that the format holds, as their rows say."""
        return tuple(s.name for s in SCHEMES.values() if self.name in s.formats)

    @property
    def dense_types(self) -> tuple[str, ...]:
        """What a recipe's `dense` may choose."""
        return self.dense_choices()

    @property
    def table_types(self) -> tuple[str, ...]:
        """What a recipe's `engram` may choose."""
        return self.table_choices()
