"""How a module's weight is stored, decided from dtypes and shapes alone, and read as a QTensor.

`config.json` is not asked: published checkpoints state one format and hold another. The decision
table is `find_weight`; add a stored format there and its reading in `read_weight`. Forms that are
no scheme of ours (zero points, group indices, FP4 under float scales) are decoded as they are read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.deepseek_v4 import PARTS, module_shape
from v4quant_formats.errors import MissingTensor, WrongDtype
from v4quant_formats.integer_packs import (
    COMPRESSED_PARTS,
    GPTQ_PARTS,
    IntegerPack,
    find_compressed,
    find_gptq,
    read_values,
)
from v4quant_formats.spec import DTYPE_BITS, TensorSpec
from v4quant_kernels.codec import dequantize, holds_nan
from v4quant_kernels.errors import NonFiniteWeight
from v4quant_kernels.ggml import unpack_mxfp4
from v4quant_kernels.ggml_types import block_type
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.ref import e2m1
from v4quant_kernels.scheme import SCHEMES, ScaleFormat, Scheme

_CPU = torch.device("cpu")
_FLOATS = ("BF16", "F32", "F16")
_SCALE_PARTS = ("scale", "weight_scale", "weight_scale_inv")
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
    *({"weight", scale, "input_scale"} for scale in _SCALE_PARTS),
    {"weight", "weight_scale", "weight_scale_2", "input_scale"},
    COMPRESSED_PARTS,
    GPTQ_PARTS,
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
    name = stored.scheme.name if stored.scheme else stored.first.dtype.lower()
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
        return _fp4(module, parts)
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


def _matrix(spec: TensorSpec) -> tuple[int, int]:
    if len(spec.shape) != 2 or 0 in spec.shape:
        raise WrongDtype(f"{spec.file}: '{spec}' must be a non-empty matrix [out, in]")
    return spec.shape[0], spec.shape[1]


def _fp8(module: str, parts: dict[str, TensorSpec]) -> StoredWeight:
    weight = parts["weight"]
    scale = _require(module, parts, _SCALE_PARTS)
    rows, columns = _matrix(weight)
    form = _FP8_SCALES.get(scale.dtype)
    if form == "f32" and rows > 1 and scale.shape == (rows, 1):
        scheme = Scheme("fp8-channel", "e4m3", 8, (1, columns), "f32")  # one scale per row
        return StoredWeight(module, parts, (rows, columns), scheme)
    for block in ((128, 128), (1, 32), (32, 32)):
        if form is None or scale.shape != (-(-rows // block[0]), -(-columns // block[1])):
            continue
        if block == (128, 128):
            scheme = replace(SCHEMES["fp8"], scale=form)
        elif block == (32, 32):
            scheme = Scheme("fp8-32x32", "e4m3", 8, block, form)
        elif form == "e8m0" and columns % 32 == 0:
            scheme = SCHEMES["mxfp8"]
        else:
            continue
        return StoredWeight(module, parts, (rows, columns), scheme)
    raise WrongDtype(f"{scale.file}: scale '{scale}' does not fit its weight '{weight}'")


def _fp4(module: str, parts: dict[str, TensorSpec]) -> StoredWeight:
    weight = parts["weight"]
    scale = _require(module, parts, _SCALE_PARTS)
    rows, half = _matrix(weight)
    shape = (rows, 2 * half)
    if scale.dtype in _FLOAT_SCALES and len(scale.shape) == 2 and scale.shape[0] == rows:
        group = shape[1] // max(scale.shape[1], 1)
        if group in (16, 32, 64, 128) and group * scale.shape[1] == shape[1]:
            scheme = Scheme(f"fp4-g{group}", "e2m1", 4, (1, group), "f32")
            return StoredWeight(module, parts, shape, scheme)
    if scale.dtype in ("F8_E8M0", "U8") and scale.shape == (rows, shape[1] // 32):
        if shape[1] % 32 == 0:
            return StoredWeight(module, parts, shape, SCHEMES["mxfp4"])
    elif scale.dtype == "F8_E4M3" and scale.shape == (rows, shape[1] // 16):
        second = _require(module, parts, ("weight_scale_2",))
        if second.dtype == "F32" and second.numel == 1 and shape[1] % 16 == 0:
            return StoredWeight(module, parts, shape, SCHEMES["nvfp4"])
    raise WrongDtype(f"{scale.file}: scale '{scale}' does not fit its FP4 weight '{weight}'")


def _packed_fp4(module: str, parts: dict[str, TensorSpec]) -> StoredWeight:
    """E2M1 nibbles as compressed-tensors names them: MXFP4, or NVFP4 with a global divisor."""
    packed, scale = parts["weight_packed"], _require(module, parts, ("weight_scale",))
    rows, half = _matrix(packed)
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
    return next((stored.parts[p] for p in _SCALE_PARTS if p in stored.parts), None)


def _blocks(module: str, weight: TensorSpec) -> StoredWeight:
    """A matrix in one of GGUF's block types, elements and scales in one tensor."""
    kind = block_type(weight.dtype)
    assert kind is not None, weight
    rows, row_bytes = _matrix(weight)
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
    scheme = SCHEMES.get(f"int{pack.bits}-g{pack.group}") if plain else None
    if scheme is not None:
        return StoredWeight(module, parts, pack.shape, scheme)
    return StoredWeight(module, parts, pack.shape, _pack_scheme(pack), pack)


def _said_shape(
    checkpoint: Checkpoint, module: str, spec: TensorSpec | None
) -> tuple[int, int] | None:
    """[N, K] of a packed matrix: what `weight_shape` says, else what config.json implies."""
    if spec is None:
        implied = module_shape(checkpoint.dimensions, module) if checkpoint.dimensions else None
        return (implied[0], implied[1]) if implied and len(implied) == 2 else None
    if spec.shape != (2,) or spec.dtype not in ("I64", "I32"):
        return None
    rows, columns = (int(n) for n in checkpoint.read(spec.name).tolist())
    return (rows, columns) if min(rows, columns) > 0 else None


def _pack_scheme(pack: IntegerPack) -> Scheme:
    return Scheme(pack.name, "int", pack.bits, (1, pack.group), "bf16")


Rows = tuple[int, int] | Tensor | None
"""Which rows of a matrix: start and stop, numbers (int64 `[n]`), or all."""


def read_weight(checkpoint: Checkpoint, stored: StoredWeight, rows: Rows = None) -> QTensor:
    """Read a coded matrix, or its rows: `start:stop` (start a multiple of the block's height), or
    those of some numbers, which then have a scale each.

    Forms that no scheme has come as float32 values (`PLAIN_SCHEMES`). Raises NonFiniteWeight for
    NaN codes or scales, WrongDtype for a group index that names no group.
    """
    scheme = stored.scheme
    assert scheme is not None, stored.module
    if stored.base is not None:
        return _read_merged(checkpoint, stored.base, rows)
    if stored.pack is not None:
        return _read_pack(checkpoint, stored, stored.pack, rows)
    if stored.parts.keys() == {"weight"}:
        return _read_blocks(checkpoint, stored, rows)
    height = scheme.block[0]
    assert not isinstance(rows, tuple) or rows[0] % height == 0, (stored.module, rows)
    if isinstance(rows, Tensor):
        scheme = replace(scheme, block=(1, scheme.block[1]))

    def read(part: str, height: int = 1) -> Tensor:
        value = _read_part(checkpoint, stored.parts[part], rows, height)
        check_finite(checkpoint, stored.parts[part], value)
        return value

    scale_name = next(p for p in _SCALE_PARTS if p in stored.parts)
    scale = read(scale_name, height)
    if scheme.scale == "e8m0":
        if scale.dtype == torch.uint8:  # stored as plain bytes, which `check_finite` lets pass
            _refuse_nan_scale(checkpoint, stored.parts[scale_name], scale)
        scale = scale.view(torch.float8_e8m0fnu)
    elif scheme.scale == "f32":
        scale = scale.float()
    global_scale: Tensor | None = None
    if "weight_packed" in stored.parts:
        codes = read("weight_packed").view(torch.uint8)
    else:
        codes = read("weight")
        if scheme.element == "e2m1":
            codes = codes.view(torch.uint8)
    if scheme.has_global_scale:
        global_scale = _global_scale(checkpoint, stored)
    shape = (codes.shape[0], stored.shape[1])
    if scheme.element == "e2m1" and scheme.scale == "f32":
        groups = e2m1.decode_packed(codes).view(*scale.shape, scheme.group_size)
        return _plain_matrix(groups.mul_(scale.unsqueeze(-1)).view(shape))
    return QTensor(scheme, shape, codes, scale, global_scale)


def _read_part(checkpoint: Checkpoint, spec: TensorSpec, rows: Rows, height: int = 1) -> Tensor:
    """A part of a weight, of which a row stands for `height` rows of the matrix."""
    if rows is None:
        return checkpoint.read(spec.name)
    if isinstance(rows, Tensor):
        return checkpoint.read_rows_at(spec.name, (rows // height).tolist())
    return checkpoint.read_rows(spec.name, rows[0] // height, -(-rows[1] // height))


def read_matrix(
    checkpoint: Checkpoint, stored: StoredWeight, rows: tuple[int, int] | None = None
) -> QTensor:
    """As `read_weight`, also of a plain matrix, whose codes are then its values as stored.

    Raises WrongDtype for what is no matrix of floats.
    """
    if stored.scheme is not None:
        return read_weight(checkpoint, stored, rows)
    spec = stored.first
    if not stored.is_plain_matrix:
        raise WrongDtype(f"{checkpoint.path / spec.file}: '{spec}' is no matrix of floats")
    start, stop = rows or (0, spec.shape[0])
    value = checkpoint.read_rows(spec.name, start, stop)
    check_finite(checkpoint, spec, value)
    return QTensor(PLAIN_SCHEMES[spec.dtype], (stop - start, spec.shape[1]), value)


def _read_merged(checkpoint: Checkpoint, base: StoredWeight, rows: Rows) -> QTensor:
    """A matrix with an adapter's delta: added in float64, rounded once to float32."""
    assert checkpoint.deltas is not None
    delta = checkpoint.deltas.delta(base.module)
    if isinstance(rows, Tensor):
        whole = _read_merged(checkpoint, base, None)
        return _plain_matrix(whole.codes[rows])
    start, stop = rows or (0, base.shape[0])
    height = 1 if base.scheme is None else base.scheme.block[0]
    first, last = start // height * height, min(-(-stop // height) * height, base.shape[0])
    values = dequantize(read_matrix(checkpoint, base, (first, last))).double()
    merged = values[start - first : stop - first] + delta[start:stop]
    return _plain_matrix(merged.float())


def _plain_matrix(values: Tensor) -> QTensor:
    return QTensor(PLAIN_SCHEMES["F32"], (values.shape[0], values.shape[1]), values)


def _read_pack(
    checkpoint: Checkpoint, stored: StoredWeight, pack: IntegerPack, rows: Rows
) -> QTensor:
    def read(part: str) -> Tensor | None:
        spec = stored.parts.get(part)
        if spec is None:
            return None
        value = checkpoint.read(spec.name)
        check_finite(checkpoint, spec, value)
        return value

    try:
        values = read_values(pack, read)
    except WrongDtype as error:
        where = checkpoint.path / stored.first.file
        raise WrongDtype(f"{where}: '{stored.module}': {error}") from None
    if rows is None:
        return _plain_matrix(values)
    return _plain_matrix(values[rows if isinstance(rows, Tensor) else slice(*rows)])


def _global_scale(checkpoint: Checkpoint, stored: StoredWeight) -> Tensor:
    """The multiplier of a whole matrix; compressed-tensors stores its reciprocal."""
    inverse = "weight_global_scale" in stored.parts
    second = stored.parts["weight_global_scale" if inverse else "weight_scale_2"]
    value = checkpoint.read(second.name).reshape(())
    check_finite(checkpoint, second, value)
    if inverse and not float(value) > 0:
        raise NonFiniteWeight(_not_finite(checkpoint, second))
    return value.reciprocal() if inverse else value


def _read_blocks(checkpoint: Checkpoint, stored: StoredWeight, rows: Rows) -> QTensor:
    assert stored.scheme is not None
    weight = stored.parts["weight"]
    codes = _read_part(checkpoint, weight, rows)
    shape = (codes.shape[0], stored.shape[1])
    if stored.scheme.name == "mxfp4":
        # Byte 255 is NaN in the release and a number in llama.cpp: nobody may have meant it.
        nibbles, scale = unpack_mxfp4(codes)
        _refuse_nan_scale(checkpoint, weight, scale)
        return QTensor(stored.scheme, shape, nibbles, scale)
    q = QTensor(stored.scheme, shape, codes)
    check_finite(checkpoint, replace(weight, dtype="F32"), dequantize(q))
    return q


def check_finite(checkpoint: Checkpoint, spec: TensorSpec, value: Tensor) -> None:
    """Refuse NaN and infinity (and E4M3 and E8M0 NaN codes) in data read for `spec`.

    Raises NonFiniteWeight. Integers pass: their bytes cannot be non-finite.
    """
    if spec.dtype == "F8_E8M0":
        _refuse_nan_scale(checkpoint, spec, value)
        return
    if spec.dtype == "F8_E4M3":
        bad = holds_nan(value)
    elif value.is_floating_point():
        bad = not bool(torch.isfinite(value).all())
    else:
        bad = False
    if bad:
        raise NonFiniteWeight(_not_finite(checkpoint, spec))


def _refuse_nan_scale(checkpoint: Checkpoint, spec: TensorSpec, scale: Tensor) -> None:
    if bool((scale.view(torch.uint8) == 255).any()):
        raise NonFiniteWeight(_not_finite(checkpoint, spec))


def _not_finite(checkpoint: Checkpoint, spec: TensorSpec) -> str:
    return (
        f"{checkpoint.path / spec.file}: '{spec.name}' holds NaN or infinity; "
        "the file is damaged or was converted wrongly, download it again"
    )


def read_dense(checkpoint: Checkpoint, module: str, device: torch.device = _CPU) -> Tensor:
    """A module's values in float32 (integer tables as stored): what the forward pass computes with.

    They are decoded on `device`, so that codes and not values travel there. Exact for every stored
    format. Raises as `find_weight` and `read_weight` do.
    """
    stored = find_weight(checkpoint, module)
    if stored.scheme is not None:
        return dequantize(read_weight(checkpoint, stored).to(device))
    value = checkpoint.read(next(iter(stored.parts.values())).name)
    if not value.is_floating_point():
        return value.to(device)
    check_finite(checkpoint, next(iter(stored.parts.values())), value)
    return value.to(device).float()


def read_coded(checkpoint: Checkpoint, module: str, device: torch.device = _CPU) -> QTensor:
    """A module's codes and scales, or its BF16 values, on `device`.

    Raises WrongDtype for a matrix of another kind, else as `find_weight` and `read_weight` do.
    """
    stored = find_weight(checkpoint, module)
    if stored.scheme is not None:
        return read_weight(checkpoint, stored).to(device)
    spec = next(iter(stored.parts.values()))
    if spec.dtype != "BF16":
        raise WrongDtype(f"{spec.file}: '{spec}' is neither quantized nor BF16")
    rows, columns = _matrix(spec)
    value = checkpoint.read(spec.name)
    check_finite(checkpoint, spec, value)
    return QTensor(SCHEMES["bf16"], (rows, columns), value).to(device)


def read_dense_rows(
    checkpoint: Checkpoint, module: str, start: int, stop: int, device: torch.device = _CPU
) -> Tensor:
    """Rows start .. stop - 1 of `read_dense`; only they, and what shares a scale, are read."""
    stored = find_weight(checkpoint, module)
    if stored.scheme is not None:
        height = stored.scheme.block[0]
        first, last = start // height * height, min(-(-stop // height) * height, stored.shape[0])
        coded = read_weight(checkpoint, stored, (first, last)).to(device)
        return dequantize(coded)[start - first : stop - first]
    spec = next(iter(stored.parts.values()))
    value = checkpoint.read_rows(spec.name, start, stop)
    if not value.is_floating_point():
        return value.to(device)
    check_finite(checkpoint, spec, value)
    return value.to(device).float()


def read_dense_at(
    checkpoint: Checkpoint, module: str, rows: Tensor, device: torch.device = _CPU
) -> Tensor:
    """Rows of `read_dense` by number, `[n, K]`: of tables too large to read. Nothing else is read.

    rows: int64 `[n]`; sorted ones are read in the file's order. Raises IndexError for a row that
    is not there.
    """
    stored = find_weight(checkpoint, module)
    if stored.scheme is not None:
        return dequantize(read_weight(checkpoint, stored, rows).to(device))
    spec = next(iter(stored.parts.values()))
    value = _read_part(checkpoint, spec, rows)
    check_finite(checkpoint, spec, value)
    return value.to(device).float()
