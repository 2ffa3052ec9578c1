"""Integer matrices as other tools store them: what their parts say, and their values.

Four layouts besides the one that has a scheme (symmetric, BF16 scales, `weight_shape`):

| tool | codes | zero points | scales | order of columns |
|---|---|---|---|---|
| compressed-tensors | `weight_packed` [N, ceil(K*b/32)], along K | `weight_zero_point` [N*b/32, K/g], along N | `weight_scale` [N, K/g] | `weight_g_idx` [K] |
| GPTQ | `qweight` [K*b/32, N], along K | `qzeros` [K/g, N*b/32], along N | `scales` [K/g, N] | `g_idx` [K] |
| compressed-tensors, int8 | `weight` I8 [N, K] | `weight_zero_point` I8 [N, K/g] | `weight_scale` [N, K/g] | none |
| AWQ | `qweight` [K, N/8], along N, nibbles 0 2 4 6 1 3 5 7 | `qzeros` [K/g, N/8], likewise | `scales` [K/g, N] | none |

A value is `(code - zero) * scale` in float32. Codes are unsigned little-endian bit streams in I32
words, of the plain int8 layout signed bytes. GPTQ stores zero points less one, unless config.json's
`checkpoint_format` is `gptq_v2`; where all are the middle code, as symmetric packs have them, the
stored numbers tell which it is, and must not contradict config.json.
A group index names each column's group, so that groups need not be neighbours; one of -1 only is
compressed-tensors' way to say that there is none.

Sources: compressed-tensors `compressors/quantized_compressors`, AutoGPTQ `qlinear`, AutoAWQ `packing_utils`.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from v4quant_formats.errors import WrongDtype
from v4quant_formats.spec import TensorSpec
from v4quant_kernels.late import torch
from v4quant_kernels.ref.pack import WIDTHS, unpack_bits

if TYPE_CHECKING:
    from torch import Tensor

Tool = Literal["compressed-tensors", "int8", "gptq", "awq"]

GPTQ_PARTS = frozenset({"qweight", "qzeros", "scales", "g_idx"})
COMPRESSED_PARTS = frozenset(
    {"weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"}
)
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_SCALES = ("BF16", "F16", "F32")
PLAIN_PARTS = frozenset({"weight", "weight_scale", "weight_zero_point"})
# What GPTQ's layouts are called; others (marlin, ...) order their words otherwise.
_VERSIONS = (None, "gptq", "gptq_v2")


@dataclass(frozen=True)
class IntegerPack:
    """Which tool's layout a matrix [N, K] is in, its bits per code and columns per group.

    plus_one: zero points are stored less one. declared: config.json says whether they are.
    """

    tool: Tool
    bits: int
    group: int
    shape: tuple[int, int]
    plus_one: bool = False
    declared: bool = False

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"int{self.bits}-g{self.group} ({self.tool})"


def find_gptq(
    module: str, parts: Mapping[str, TensorSpec], config: Mapping[str, Any]
) -> IntegerPack:
    """The layout of a `qweight`. Raises WrongDtype where shapes and dtypes fit no layout."""
    weight, scales, zeros = (parts.get(p) for p in ("qweight", "scales", "qzeros"))
    if weight is None or scales is None or zeros is None:
        raise WrongDtype(
            f"'{module}' is stored as {sorted(parts)}; GPTQ and AWQ need qweight, qzeros and scales"
        )
    for pack in _gptq_candidates(weight, scales, zeros, config):
        index = parts.get("g_idx")
        if index is None or (
            pack.tool == "gptq" and index.dtype == "I32" and index.shape == (pack.shape[1],)
        ):
            return pack
    raise WrongDtype(
        f"{weight.file}: '{weight}', '{scales}' and '{zeros}' fit neither GPTQ's layout nor AWQ's"
    )


def _gptq_candidates(
    weight: TensorSpec, scales: TensorSpec, zeros: TensorSpec, config: Mapping[str, Any]
) -> list[IntegerPack]:
    if any(len(s.shape) != 2 or 0 in s.shape for s in (weight, scales, zeros)):
        return []
    if (weight.dtype, zeros.dtype) != ("I32", "I32") or scales.dtype not in _SCALES:
        return []
    groups, rows = scales.shape
    if zeros.shape[0] != groups or (zeros.shape[1] * 32) % rows:
        return []
    bits, found = zeros.shape[1] * 32 // rows, []
    if bits in WIDTHS and weight.shape[1] == rows and weight.shape[0] * 32 % bits == 0:
        columns = weight.shape[0] * 32 // bits
        if columns % groups == 0:
            version = _version(config)
            if version not in _VERSIONS:
                raise WrongDtype(
                    f"{weight.file}: config.json's checkpoint_format is {str(version)[:40]!r}, not "
                    "gptq or gptq_v2; its words are in another order"
                )
            shape, group = (rows, columns), columns // groups
            found.append(
                IntegerPack("gptq", bits, group, shape, version != "gptq_v2", version is not None)
            )
    if bits == 4 and weight.shape[1] * 8 == rows and weight.shape[0] % groups == 0:
        columns = weight.shape[0]
        found.append(IntegerPack("awq", 4, columns // groups, (rows, columns)))
    return found if len(found) == 1 else []


def _version(config: Mapping[str, Any]) -> Any:
    """GPTQModel says it under a second name."""
    declared = config.get("quantization_config")
    if not isinstance(declared, Mapping):
        return None
    own = declared.get("format") if declared.get("quant_method") == "gptq" else None
    return declared.get("checkpoint_format", own)


def find_plain(
    parts: Mapping[str, TensorSpec], shape: tuple[int, ...] | None
) -> IntegerPack | None:
    """The layout of an I8 `weight` under float scales, a row or a group each; `shape` is [N, K] as
    config.json implies it, without which bytes could be pairs of FP4. None where they fit none."""
    weight, scale, zero = (parts.get(p) for p in ("weight", "weight_scale", "weight_zero_point"))
    if weight is None or scale is None or weight.dtype != "I8" or weight.shape != shape:
        return None
    if len(scale.shape) != 2 or scale.dtype not in _SCALES or scale.shape[0] != weight.shape[0]:
        return None
    rows, columns = weight.shape
    group, rest = divmod(columns, max(scale.shape[1], 1))
    if rest or not scale.shape[1]:
        return None
    if zero is not None and (zero.dtype, zero.shape) != ("I8", scale.shape):
        return None
    return IntegerPack("int8", 8, group, (rows, columns))


def find_compressed(
    parts: Mapping[str, TensorSpec], shape: tuple[int, int] | None
) -> IntegerPack | None:
    """The layout of a `weight_packed` of integers; `shape` is [N, K], None where nothing says it.

    None where shapes and dtypes fit no layout.
    """
    packed, scale = parts.get("weight_packed"), parts.get("weight_scale")
    if packed is None or scale is None or shape is None or packed.dtype != "I32":
        return None
    rows, columns = shape
    if len(packed.shape) != 2 or len(scale.shape) != 2 or scale.dtype not in _SCALES:
        return None
    if packed.shape[0] != rows or scale.shape[0] != rows or not scale.shape[1]:
        return None
    group, rest = divmod(columns, scale.shape[1])
    bits = [b for b in WIDTHS if packed.shape[1] == -(-columns * b // 32)]
    if rest or len(bits) != 1:
        return None
    zero, index = parts.get("weight_zero_point"), parts.get("weight_g_idx")
    wanted = (-(-rows * bits[0] // 32), scale.shape[1])
    if zero is not None and (zero.dtype, zero.shape) != ("I32", wanted):
        return None
    if index is not None and (index.dtype, index.shape) != ("I32", (columns,)):
        return None
    return IntegerPack("compressed-tensors", bits[0], group, (rows, columns))


def read_values(pack: IntegerPack, read: Callable[[str], Tensor | None]) -> Tensor:
    """float32 [N, K]. read(part) gives a whole part as stored, None for one that is absent.

    Raises WrongDtype when a group index names a group that is not there.
    """
    rows, columns = pack.shape
    if pack.tool == "compressed-tensors":
        codes = _stream(_need(read, "weight_packed"), pack.bits, columns)
        scale, zero = _need(read, "weight_scale").float(), read("weight_zero_point")
        if zero is None:
            zeros = torch.full_like(scale, 1 << (pack.bits - 1))
        else:
            zeros = _stream(zero.mT, pack.bits, rows).mT.float()
        index = read("weight_g_idx")
        if index is not None and bool((index == -1).all()):
            index = None
    elif pack.tool == "int8":
        codes = _need(read, "weight")
        scale, zero = _need(read, "weight_scale").float(), read("weight_zero_point")
        zeros = torch.zeros_like(scale) if zero is None else zero.float()
        index = None
    elif pack.tool == "gptq":
        codes = _stream(_need(read, "qweight").mT, pack.bits, columns)
        scale = _need(read, "scales").mT.float()
        zeros = _gptq_zeros(pack, _stream(_need(read, "qzeros"), pack.bits, rows)).mT.float()
        index = read("g_idx")
    else:
        codes = _nibbles(_need(read, "qweight")).mT
        scale = _need(read, "scales").mT.float()
        zeros = _nibbles(_need(read, "qzeros")).mT.float()
        index = None
    values = codes.float()
    if index is None:
        grouped = values.reshape(rows, -1, pack.group)
        return grouped.sub_(zeros.unsqueeze(-1)).mul_(scale.unsqueeze(-1)).view(rows, columns)
    groups = index.long()
    if int(groups.min()) < 0 or int(groups.max()) >= scale.shape[1]:
        raise WrongDtype(
            f"its group index runs {int(groups.min())}..{int(groups.max())}, but there are "
            f"{scale.shape[1]} groups"
        )
    return (values - zeros[:, groups]) * scale[:, groups]


def _gptq_zeros(pack: IntegerPack, stored: Tensor) -> Tensor:
    """Zero points from what is stored. Raises WrongDtype where config.json and numbers disagree."""
    middle = 1 << (pack.bits - 1)
    told = middle - 1 if pack.plus_one else middle
    if bool((stored == 2 * middle - 1 - told).all()):
        if not pack.declared and pack.plus_one:
            return stored  # symmetric, and stored as they are
        raise WrongDtype(
            f"all its zero points are stored as {2 * middle - 1 - told}, where config.json's "
            f"checkpoint_format makes it {told} for the middle of {pack.bits} bits; one of them is "
            "wrong"
        )
    return stored + int(pack.plus_one)


def _need(read: Callable[[str], Tensor | None], part: str) -> Tensor:
    value = read(part)
    assert value is not None, part
    return value


def _stream(words: Tensor, bits: int, count: int) -> Tensor:
    """int16 [n, count] unsigned codes of I32 words [n, ceil(count*bits/32)]."""
    raw = words.contiguous().view(torch.uint8).view(words.shape[0], -1)
    return unpack_bits(raw, bits, count).to(torch.int16) + (1 << (bits - 1))


def _nibbles(words: Tensor) -> Tensor:
    """int16 [n, 8m] codes of AWQ's words [n, m]: nibble p of a word is column `_AWQ_ORDER[p]`."""
    shifts = torch.arange(8) * 4
    codes = (words.unsqueeze(-1) >> shifts) & 15
    back = torch.tensor(_AWQ_ORDER).argsort()
    return codes[..., back].reshape(words.shape[0], -1).to(torch.int16)
