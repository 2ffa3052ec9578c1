"""A second reader of V4.1's safetensors, written from the formats' definitions alone.

It shares no code with the product and reads as an engine does: config.json says how a module is
stored, under the engine's own name for it, and nothing is guessed from shapes. What the file holds
must then have exactly the tensors that form has. Values are float64.

* E2M1: sign, two exponent bits, one mantissa bit; low nibble first. E4M3 as in OFP8, no infinity.
* E8M0: 2^(byte - 127), 255 is NaN. Block scales cover [1, 32] (MX), [1, 16] (NVFP4, E4M3 times a
  float32 of the whole matrix), or a tile as `weight_block_size` says, ragged at the edges.
* Packed integers: a little-endian bit stream along a row, stored with an offset of half the range.
* Engram tables: E4M3 rows with an E8M0 scale per row and 32 columns, whatever config.json says.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Raw = npt.NDArray[np.uint8]

_LINEAR = re.compile(
    r"(attn\.(wq_a|wq_b|wkv|wo_a|wo_b)|attn\.indexer\.wq_b|engram\.wkv|main_proj"
    r"|ffn\.(shared_experts|experts\.\d+)\.w[123])$"
)
_PART = re.compile(
    r"\.(weight|scale|weight_packed|weight_scale|weight_scale_2|weight_shape|input_scale)$"
)
_FUSED = (
    (r"attn\.(wq_a|wkv)$", "attn.fused_wqa_wkv"),
    (r"shared_experts\.(w1|w3)$", "shared_experts.gate_up_proj"),
    (r"shared_experts\.w2$", "shared_experts.down_proj"),
)
_SGLANG = ((r"\.attn\.", ".self_attn."), (r"\.ffn\.", ".mlp."), (r"^layers\.", "model.layers."))
_WIDTHS = {"F8_E4M3": 1, "F8_E8M0": 1, "U8": 1, "I8": 1, "BF16": 2, "F32": 4, "I32": 4, "I64": 8}


@dataclass(frozen=True)
class Stored:
    """One tensor: dtype, shape, bytes."""

    dtype: str
    shape: tuple[int, ...]
    raw: Raw

    @property
    def floats(self) -> Array:
        """Its numbers, by its own dtype."""
        return _numbers(self.raw, self.dtype).reshape(self.shape)


class SecondReader:
    """A folder as `engine` ("vllm" or "sglang") understands it."""

    def __init__(self, folder: Path, engine: str) -> None:
        self.engine = engine
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self.table: dict[str, Any] = self.config.get("quantization_config") or {}
        self.layers: int = self.config["text_config"]["num_hidden_layers"]
        self.tensors: dict[str, Stored] = {}
        for path in sorted(folder.glob("*.safetensors")):
            self.tensors |= _read(path)

    def modules(self) -> list[str]:
        """Everything with numbers of its own: weights with their scales, and single tensors."""
        return sorted({_PART.sub("", name) for name in self.tensors})

    def values(self, module: str) -> Array:
        """A module's numbers; AssertionError where its tensors are not what is declared."""
        held = {
            name.removeprefix(module).lstrip("."): tensor
            for name, tensor in self.tensors.items()
            if name == module or (_PART.search(name) and _PART.sub("", name) == module)
        }
        if module.endswith("engram.embed"):
            return _blocks(held, "scale", (1, 32), ("F8_E8M0",))
        form = self.form(module)
        if form == "plain":
            assert len(held) == 1, (module, sorted(held))
            return next(iter(held.values())).floats
        kind, _, rest = form.partition(" ")
        if kind == "fp8":
            tile = self.table.get("linear_fp8_config", self.table)["weight_block_size"]
            dtypes = ("F8_E8M0",) if rest == "e8m0" else ("F32",)
            return _blocks(held, "scale", (tile[0], tile[1]), dtypes)
        if kind == "mxfp4":
            return _blocks(held, "scale", (1, 32), ("F8_E8M0",))
        if kind == "ct-mxfp4":
            return _blocks(held, "weight_scale", (1, 32), ("U8",), "weight_packed")
        if kind == "ct-mxfp8":
            return _blocks(held, "weight_scale", (1, 32), ("U8",))
        if kind == "nvfp4":
            assert held.keys() == {"weight", "weight_scale", "weight_scale_2", "input_scale"}
            assert float(held["input_scale"].floats) > 0
            pair = {k: held[k] for k in ("weight", "weight_scale")}
            second = float(held["weight_scale_2"].floats)
            return _blocks(pair, "weight_scale", (1, 16), ("F8_E4M3",)) * second
        assert kind == "int", form
        bits, group = map(int, rest.split())
        return _integers(held, bits, group)

    def form(self, module: str) -> str:
        """How config.json says that a module is stored."""
        if not _LINEAR.search(module):
            return "plain"
        expert = ".experts." in module
        if self.table.get("quant_method") == "fp8":
            return self._native(module, expert)
        if self.table.get("quant_method") == "compressed-tensors":
            if not expert and "linear_fp8_config" in self.table and self.engine == "sglang":
                return "fp8 e8m0"
            return self._group(module)
        assert not self.table
        return "plain"

    def _native(self, module: str, expert: bool) -> str:
        if {module, self.name(module)} & set(self.table.get("ignored_layers", ())):
            return "plain"
        fp4 = self.table["expert_dtype"] == "fp4"
        if not expert or not fp4:
            return "fp8 e8m0" if fp4 else "fp8 f32"
        if self.table.get("moe_quant_algo") != "NVFP4":
            return "mxfp4"
        layer = module.partition(".experts.")[0] + ".experts"
        kept = any(fnmatchcase(layer, pattern) for pattern in self.table["ignore"])
        return "mxfp4" if kept else "nvfp4"

    def _group(self, module: str) -> str:
        name = self.name(module)
        hits = [
            group
            for group in self.table["config_groups"].values()
            if any(re.match(t.removeprefix("re:"), name) for t in group["targets"])
        ]
        ignored = any(
            re.match(i.removeprefix("re:"), name) if i.startswith("re:") else i == name
            for i in self.table["ignore"]
        )
        if ignored or not hits:
            assert ignored or self.engine == "vllm", f"SGLang refuses {name}: it is in no list"
            return "plain"
        weights = hits[0]["weights"]
        if weights["type"] == "int":
            assert hits[0]["format"] == "pack-quantized" and weights["symmetric"]
            return f"int {weights['num_bits']} {weights['group_size']}"
        assert weights["group_size"] == 32 and weights["scale_dtype"] == "torch.uint8"
        return f"ct-mxfp{weights['num_bits']}"

    def name(self, module: str) -> str:
        """The engine's name of a module."""
        if self.engine == "sglang":
            for pattern, text in _SGLANG:
                module = re.sub(pattern, text, module)
            gated = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
            path, _, last = module.rpartition(".")
            return f"{path}.{gated.get(last, last)}"
        draft = re.match(r"mtp\.(\d+)\.(.*)", module)
        for pattern, text in _FUSED:
            module = re.sub(pattern, text, module)
        if draft is None:
            return f"language_model.model.{module}"
        rest = module.split(".", 2)[2]
        return (
            f"model.{rest}"
            if rest == "main_proj"
            else (f"model.layers.{self.layers + int(draft[1])}.{rest}")
        )


def _read(path: Path) -> dict[str, Stored]:
    data = np.fromfile(path, np.uint8)
    size = int(data[:8].view("<u8")[0])
    header = json.loads(data[8 : 8 + size].tobytes())
    body = data[8 + size :]
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            found[name] = Stored(entry["dtype"], tuple(entry["shape"]), body[first:last])
            count = int(np.prod(entry["shape"], dtype=np.int64))
            assert last - first == count * _WIDTHS[entry["dtype"]], name
    return found


def _numbers(raw: Raw, dtype: str) -> Array:
    raw = np.ascontiguousarray(raw)
    if dtype in ("F8_E8M0", "U8"):
        assert not (raw == 255).any()
        return np.ldexp(1.0, raw.astype(np.int64) - 127)
    if dtype == "F8_E4M3":
        return _small(raw, 4, 3, 7)
    if dtype == "BF16":
        bits = raw.view("<u2").astype("<u4") << 16
        return bits.view("<f4").astype(np.float64)
    kinds = {"F32": "<f4", "I32": "<i4", "I64": "<i8"}
    return raw.view(kinds[dtype]).astype(np.float64)


def _small(code: Raw, exponent_bits: int, mantissa_bits: int, bias: int) -> Array:
    """A float of few bits: 2^(e - bias) * 1.m, or 2^(1 - bias) * 0.m where e is 0."""
    wide = code.astype(np.int64)
    mantissa = wide & ((1 << mantissa_bits) - 1)
    exponent = (wide >> mantissa_bits) & ((1 << exponent_bits) - 1)
    sign = np.where(wide >> (mantissa_bits + exponent_bits) & 1, -1.0, 1.0)
    if exponent_bits == 4:
        assert not ((exponent == 15) & (mantissa == 7)).any(), "NaN"
    hidden = np.where(exponent > 0, 1 << mantissa_bits, 0)
    power = np.maximum(exponent, 1) - bias - mantissa_bits
    return sign * np.ldexp((hidden + mantissa).astype(np.float64), power)


def _blocks(
    held: dict[str, Stored],
    scale: str,
    block: tuple[int, int],
    dtypes: tuple[str, ...],
    codes: str = "weight",
) -> Array:
    assert held.keys() == {codes, scale}, sorted(held)
    weight, scales = held[codes], held[scale]
    assert scales.dtype in dtypes, scales.dtype
    if weight.dtype == "F8_E4M3":
        values = weight.floats
    else:
        assert weight.dtype in ("I8", "U8"), weight.dtype
        raw = weight.raw.reshape(weight.shape)
        nibbles = np.stack((raw & 15, raw >> 4), -1).reshape(weight.shape[0], -1)
        values = _small(nibbles, 2, 1, 1)
    rows, columns = values.shape
    assert scales.shape == (-(-rows // block[0]), -(-columns // block[1])), scales.shape
    wide = np.repeat(np.repeat(scales.floats, block[0], axis=0), block[1], axis=1)
    product: Array = values * wide[:rows, :columns]
    return product


def _integers(held: dict[str, Stored], bits: int, group: int) -> Array:
    assert held.keys() == {"weight_packed", "weight_scale", "weight_shape"}, sorted(held)
    rows, columns = (int(n) for n in held["weight_shape"].floats)
    packed, scales = held["weight_packed"], held["weight_scale"]
    assert packed.dtype == "I32" and packed.shape == (rows, -(-columns * bits // 32))
    assert scales.dtype == "BF16" and scales.shape == (rows, columns // group)
    stream = np.unpackbits(packed.raw.reshape(rows, -1), axis=1, bitorder="little")
    digits = stream[:, : columns * bits].reshape(rows, columns, bits).astype(np.int64)
    codes = (digits << np.arange(bits)).sum(-1) - (1 << (bits - 1))
    return codes * np.repeat(scales.floats, group, axis=1)
