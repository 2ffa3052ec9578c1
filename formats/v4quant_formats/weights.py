"""How a module's weight is stored, decided from dtypes and shapes alone.

`config.json` is not asked: published checkpoints state one format and hold another. The decision
table is `find_weight`; add a stored format there, and its reading in `weight_reading.read_weight`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.deepseek_v4 import PARTS
from v4quant_formats.errors import MissingTensor, WrongDtype
from v4quant_formats.integer_packs import (
    COMPRESSED_PARTS,
    GPTQ_PARTS,
    PLAIN_PARTS,
    IntegerPack,
    find_compressed,
    find_gptq,
    find_plain,
)
from v4quant_formats.module_shapes import module_shape
from v4quant_formats.spec import DTYPE_BITS, TensorSpec
from v4quant_kernels.ggml_types import block_type
from v4quant_kernels.scheme import MXFP4, SCHEMES, ScaleFormat, Scheme

_FLOATS = ("BF16", "F32", "F16")
SCALE_PARTS = ("scale", "weight_scale", "weight_scale_inv")
_FLOAT_SCALES = ("F32", "BF16", "F16")
_FP8_SCALES: dict[str, ScaleFormat] = {
    **dict.fromkeys(("F8_E8M0", "U8"), "e8m0"),
    **dict.fromkeys(_FLOAT_SCALES, "f32"),
}
PLAIN_SCHEMES: dict[str, Scheme] = {
    "BF16": SCHEMES["bf16"],
    "F16": Scheme("f16", "bf16", 16, (1, 1), "none"),
    "F32": Scheme("f32", "bf16", 32, (1, 1), "none"),
}
"""How a plain matrix is held as a QTensor: its codes are its values, in the dtype of the key."""
# Parts each stored form may have; an activation scale (`input_scale`) says nothing of the weight.
_FORMS = (
    *({"weight", scale, "input_scale"} for scale in SCALE_PARTS),
    {"weight", "weight_scale", "weight_scale_2", "input_scale"},
    COMPRESSED_PARTS,
    GPTQ_PARTS,
    PLAIN_PARTS,
    {"weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"},
)


@dataclass(frozen=True)
class StoredWeight:
    """A module as stored: its parts by suffix, and for coded matrices the scheme and shape [N, K].

    `scheme` is None for a plain tensor (norms, routers, BF16 matrices, integer tables). `pack` is
    set for integers in another tool's layout, whose values only are read. `base` is set for a
    matrix that an adapter changes: it, as it is stored.
    """

    module: str
    parts: dict[str, TensorSpec]
    shape: tuple[int, ...]
    scheme: Scheme | None
    pack: IntegerPack | None = None
    base: StoredWeight | None = None

    @property
    def first(self) -> TensorSpec:
        """The part that names the file, and the dtype of a plain tensor."""
        return next(iter(self.parts.values()))

    @property
    def coding(self) -> str:
        """The scheme's name, or the dtype of numbers that stand for themselves, like "bf16"."""
        return self.scheme.name if self.scheme else self.first.dtype.lower()

    @property
    def is_plain_matrix(self) -> bool:
        """Whether it is a matrix of floats, which nobody has coded."""
        return self.scheme is None and len(self.shape) == 2 and self.first.dtype in PLAIN_SCHEMES

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(p.nbytes for p in self.parts.values())


def find_weight(checkpoint: Checkpoint, module: str) -> StoredWeight:
    """Decide how `module` is stored. Raises MissingTensor or WrongDtype naming the tensor."""
    stored = _find_stored(checkpoint, module)
    if checkpoint.deltas is None or module not in checkpoint.deltas:
        return stored
    name = stored.coding
    scheme = replace(PLAIN_SCHEMES["F32"], name=f"{name} with adapter")
    return StoredWeight(module, stored.parts, stored.shape, scheme, base=stored)


def _find_stored(checkpoint: Checkpoint, module: str) -> StoredWeight:
    tensors = checkpoint.tensors
    parts = {p: tensors[n] for p in PARTS if (n := f"{module}.{p}") in tensors}
    if module in tensors and not parts and block_type(tensors[module].dtype):
        return _blocks(module, tensors[module])
    if module in tensors and not parts:
        return StoredWeight(module, {"": tensors[module]}, tensors[module].shape, None)
    if not parts:
        raise MissingTensor(f"{checkpoint.path}: module '{module}' has no tensor")
    if module in tensors or not any(parts.keys() <= form for form in _FORMS):
        first = next(iter(parts.values()))
        raise WrongDtype(
            f"{first.file}: '{module}' is stored as {sorted(parts)} together; no known V4 layout "
            "stores a weight so"
        )
    if "weight_packed" in parts and parts["weight_packed"].dtype == "U8":
        return _packed_fp4(module, parts)
    if "weight_packed" in parts:
        return _packed_integers(checkpoint, module, parts)
    if parts.keys() & GPTQ_PARTS:
        pack = find_gptq(module, parts, checkpoint.config)
        return StoredWeight(module, parts, pack.shape, _pack_scheme(pack), pack)
    weight = parts.get("weight")
    if weight is None:
        first = next(iter(parts.values()))
        raise MissingTensor(
            f"{first.file}: tensor '{module}.weight' is missing beside '{first.name}'"
        )
    if weight.dtype in _FLOATS and len(parts) == 1:
        return StoredWeight(module, parts, weight.shape, None)
    if weight.dtype == "F8_E4M3":
        return _fp8(module, parts)
    if weight.dtype in ("I8", "U8"):
        return _bytes(checkpoint, module, parts)
    if block_type(weight.dtype) and len(parts) == 1:
        return _blocks(module, weight)
    raise _unreadable(weight, parts)


def _unreadable(weight: TensorSpec, parts: dict[str, TensorSpec]) -> WrongDtype:
    if weight.dtype not in DTYPE_BITS:
        return WrongDtype(
            f"{weight.file}: '{weight.name}' is {weight.dtype}, which is not readable here, though "
            "llama.cpp may run it; give a file of another type"
        )
    return WrongDtype(
        f"{weight.file}: '{weight.name}' is {weight.dtype} with parts {sorted(parts)}; "
        "no known V4 layout stores a weight so"
    )


def _require(module: str, parts: dict[str, TensorSpec], names: Iterable[str]) -> TensorSpec:
    for name in names:
        if name in parts:
            return parts[name]
    first = next(iter(parts.values()))
    wanted = " or ".join(f"'{module}.{n}'" for n in names)
    raise MissingTensor(
        f"{first.file}: scale tensor {wanted} is missing beside '{first.name}'; "
        "the weight cannot be decoded without it"
    )


def matrix_of(spec: TensorSpec) -> tuple[int, int]:
    if len(spec.shape) != 2 or 0 in spec.shape:
        raise WrongDtype(f"{spec.file}: '{spec}' must be a non-empty matrix [out, in]")
    return spec.shape[0], spec.shape[1]


def _fp8(module: str, parts: dict[str, TensorSpec]) -> StoredWeight:
    weight = parts["weight"]
    scale = _require(module, parts, SCALE_PARTS)
    rows, columns = matrix_of(weight)
    form = _FP8_SCALES.get(scale.dtype)
    if form == "f32" and rows > 1 and scale.shape == (rows, 1):
        scheme = Scheme("fp8-channel", "e4m3", 8, (1, columns), "f32")  # one scale per row
        return StoredWeight(module, parts, (rows, columns), scheme)
    for block in ((128, 128), (1, 32), (32, 32)):
        if form is None or scale.shape != (-(-rows // block[0]), -(-columns // block[1])):
            continue
        if block[0] > 1:
            scheme = replace(SCHEMES["fp8"].tiled(block), scale=form)
        elif form == "e8m0" and columns % 32 == 0:
            scheme = SCHEMES["mxfp8"]
        else:
            continue
        return StoredWeight(module, parts, (rows, columns), scheme)
    raise WrongDtype(f"{scale.file}: scale '{scale}' does not fit its weight '{weight}'")


def _bytes(checkpoint: Checkpoint, module: str, parts: dict[str, TensorSpec]) -> StoredWeight:
    """Bytes of integers where config.json implies as many columns, else pairs of FP4."""
    if plain := find_plain(parts, _implied(checkpoint, module)):
        return StoredWeight(module, parts, plain.shape, _pack_scheme(plain), plain)
    if "weight_zero_point" in parts:
        raise _unreadable(parts["weight"], parts)
    return _fp4(module, parts)


def _fp4(module: str, parts: dict[str, TensorSpec]) -> StoredWeight:
    weight = parts["weight"]
    scale = _require(module, parts, SCALE_PARTS)
    rows, half = matrix_of(weight)
    shape = (rows, 2 * half)
    if scale.dtype in _FLOAT_SCALES and len(scale.shape) == 2 and scale.shape[0] == rows:
        group = shape[1] // max(scale.shape[1], 1)
        if group in (16, 32, 64, 128) and group * scale.shape[1] == shape[1]:
            scheme = Scheme(f"fp4-g{group}", "e2m1", 4, (1, group), "f32")
            return StoredWeight(module, parts, shape, scheme)
    if scale.dtype in ("F8_E8M0", "U8") and scale.shape == (rows, shape[1] // 32):
        if shape[1] % 32 == 0:
            return StoredWeight(module, parts, shape, MXFP4)
    elif scale.dtype == "F8_E4M3" and scale.shape == (rows, shape[1] // 16):
        second = _require(module, parts, ("weight_scale_2",))
        if second.dtype == "F32" and second.numel == 1 and shape[1] % 16 == 0:
            return StoredWeight(module, parts, shape, SCHEMES["nvfp4"])
    raise WrongDtype(f"{scale.file}: scale '{scale}' does not fit its FP4 weight '{weight}'")


def _packed_fp4(module: str, parts: dict[str, TensorSpec]) -> StoredWeight:
    """E2M1 nibbles as compressed-tensors names them: MXFP4, or NVFP4 with a global divisor."""
    packed, scale = parts["weight_packed"], _require(module, parts, ("weight_scale",))
    rows, half = matrix_of(packed)
    shape = (rows, 2 * half)
    second = parts.get("weight_global_scale")
    dtypes: tuple[str, ...] = ("F8_E8M0", "U8") if second is None else ("F8_E4M3",)
    name = "mxfp4" if second is None else "nvfp4"
    if second is not None and (second.dtype, second.numel) != ("F32", 1):
        raise WrongDtype(f"{second.file}: '{second}' must be one float32 number")
    scheme = SCHEMES[name]
    groups, rest = divmod(shape[1], scheme.group_size)
    if scale.dtype in dtypes and not rest and scale.shape == (rows, groups):
        return StoredWeight(module, parts, shape, scheme)
    raise WrongDtype(f"{scale.file}: scale '{scale}' does not fit its FP4 weight '{packed}'")


def scale_part(stored: StoredWeight) -> TensorSpec | None:
    """The tensor that holds a coded matrix's block scales, under whatever name."""
    return next((stored.parts[p] for p in SCALE_PARTS if p in stored.parts), None)


def _blocks(module: str, weight: TensorSpec) -> StoredWeight:
    """A matrix in one of GGUF's block types, elements and scales in one tensor."""
    kind = block_type(weight.dtype)
    assert kind is not None, weight
    rows, row_bytes = matrix_of(weight)
    if row_bytes % kind.block_bytes:
        raise WrongDtype(f"{weight.file}: '{weight}' holds no whole blocks of {weight.dtype}")
    shape = (rows, row_bytes // kind.block_bytes * kind.block)
    return StoredWeight(module, {"weight": weight}, shape, SCHEMES[kind.name])


def _packed_integers(
    checkpoint: Checkpoint, module: str, parts: dict[str, TensorSpec]
) -> StoredWeight:
    """Packed words and group counts alone are ambiguous (4 bits by 64 = 2 bits by 128), so the
    `weight_shape` is read; where there is none, config.json says what the shape must be."""
    packed = parts["weight_packed"]
    scale = _require(module, parts, ("weight_scale",))
    shape = _said_shape(checkpoint, module, parts.get("weight_shape"))
    if shape is None and "weight_shape" not in parts:
        _require(module, parts, ("weight_shape",))
    pack = find_compressed(parts, shape)
    if pack is None:
        rest = "', '".join(str(spec) for part, spec in parts.items() if part != "weight_packed")
        raise WrongDtype(
            f"{packed.file}: packed weight '{packed}' and '{rest}' do not fit together in any "
            "integer scheme"
        )
    plain = scale.dtype == "BF16" and not parts.keys() & {"weight_zero_point", "weight_g_idx"}
    if plain:
        for scheme in SCHEMES.values():
            if scheme.is_packed_integer and (scheme.bits, scheme.group_size) == (
                pack.bits,
                pack.group,
            ):
                return StoredWeight(module, parts, pack.shape, scheme)
    return StoredWeight(module, parts, pack.shape, _pack_scheme(pack), pack)


def _said_shape(
    checkpoint: Checkpoint, module: str, spec: TensorSpec | None
) -> tuple[int, int] | None:
    """[N, K] of a packed matrix: what `weight_shape` says, else what config.json implies."""
    if spec is None or not checkpoint.has_data:
        implied = _implied(checkpoint, module)
        return (implied[0], implied[1]) if implied and len(implied) == 2 else None
    if spec.shape != (2,) or spec.dtype not in ("I64", "I32"):
        return None
    rows, columns = (int(n) for n in checkpoint.read(spec.name).tolist())
    return (rows, columns) if min(rows, columns) > 0 else None


def _implied(checkpoint: Checkpoint, module: str) -> tuple[int, ...] | None:
    """The shape that config.json gives a module, where it says enough."""
    return module_shape(checkpoint.dimensions, module) if checkpoint.dimensions else None


def _pack_scheme(pack: IntegerPack) -> Scheme:
    """A scheme for codes that are decoded as they are read: none of the table's."""
    return Scheme(pack.name, "int", pack.bits, (1, pack.group), "bf16")
