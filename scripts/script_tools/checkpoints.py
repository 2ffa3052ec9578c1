"""Checkpoints that the fuzzer begins with: the release, and what other tools make of it.

Each is a small good folder: it opens, has no defect, converts and verifies. Packs are written from
the tools' own definitions, with random codes in place of one layer's experts.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from v4quant import quantize

_EXPERTS = "layers.2.ffn.experts."
Pack = Callable[[int, int, torch.Generator], dict[str, Tensor]]


@dataclass(frozen=True)
class CheckpointSeed:
    """make(source, folder) writes a good checkpoint into a new folder; adapter(folder) where one is
    to be merged."""

    name: str
    make: Callable[[Path, Path], object]
    adapter: Callable[[Path], Path] | None = None


def _copied(source: Path, folder: Path) -> None:
    shutil.copytree(source, folder)


def _quant(scheme: str, layout: str, source: Path, folder: Path) -> None:
    """A conversion of our own: a container as other tools write it, too."""
    quantize(source, folder, scheme=scheme, format=layout, workers=1)
    shutil.rmtree(folder / ".v4quant", ignore_errors=True)
    (folder / "v4quant.json").unlink()


def _words(codes: Tensor) -> Tensor:
    """I32 [n, m / 8] of 4-bit codes [n, m], the first in the lowest bits."""
    fields = codes.view(codes.shape[0], -1, 8).long() << (torch.arange(8) * 4)
    return fields.sum(-1).to(torch.int32)


def _numbers(rows: int, columns: int, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    groups = (rows, columns // 32)
    scales = torch.rand(groups, generator=rng) * 0.01 + 0.001
    codes = torch.randint(16, (rows, columns), generator=rng)
    return codes, torch.randint(1, 16, groups, generator=rng), scales.half()


def _gptq(rows: int, columns: int, rng: torch.Generator) -> dict[str, Tensor]:
    codes, zeros, scales = _numbers(rows, columns, rng)
    order = torch.randperm(columns, generator=rng)
    return {
        "qweight": _words(codes).mT.contiguous(),
        "qzeros": _words(zeros.mT.contiguous() - 1),
        "scales": scales.mT.contiguous(),
        "g_idx": (torch.arange(columns) // 32)[order].int(),
    }


def _awq(rows: int, columns: int, rng: torch.Generator) -> dict[str, Tensor]:
    codes, zeros, scales = _numbers(rows, columns, rng)

    def along(x: Tensor) -> Tensor:
        order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
        return _words(x.view(x.shape[0], -1, 8)[..., order].reshape(x.shape))

    return {
        "qweight": along(codes.mT.contiguous()),
        "qzeros": along(zeros.mT.contiguous()),
        "scales": scales.mT.contiguous(),
    }


def _asymmetric(rows: int, columns: int, rng: torch.Generator) -> dict[str, Tensor]:
    codes, zeros, scales = _numbers(rows, columns, rng)
    return {
        "weight_packed": _words(codes),
        "weight_scale": scales,
        "weight_zero_point": _words(zeros.mT.contiguous()).mT.contiguous(),
        "weight_shape": torch.tensor([rows, columns]),
    }


def _int8(rows: int, columns: int, rng: torch.Generator) -> dict[str, Tensor]:
    codes = torch.randint(-128, 128, (rows, columns), generator=rng)
    scales = torch.rand((rows, 1), generator=rng) * 0.01
    return {"weight": codes.to(torch.int8), "weight_scale": scales.bfloat16()}


def _modelopt(rows: int, columns: int, rng: torch.Generator) -> dict[str, Tensor]:
    codes = torch.randint(256, (rows, columns // 2), generator=rng)
    scales = torch.rand((rows, columns // 16), generator=rng) * 400 + 1
    return {
        "weight": codes.to(torch.uint8),
        "weight_scale": scales.to(torch.float8_e4m3fn),
        "weight_scale_2": torch.tensor(1e-4),
        "input_scale": torch.tensor(0.01),
    }


def _packed(pack: Pack, method: Mapping[str, object], source: Path, folder: Path) -> None:
    """The release with one layer's experts packed."""
    shutil.copytree(source, folder)
    rng = torch.Generator().manual_seed(7)
    index_path = folder / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    places: dict[str, str] = index["weight_map"]
    for file in sorted({f for n, f in places.items() if n.startswith(_EXPERTS)}):
        tensors = load_file(folder / file)
        for name in [n for n in tensors if n.startswith(_EXPERTS) and n.endswith(".weight")]:
            module = name.removesuffix(".weight")
            rows, half = tensors.pop(name).shape
            del tensors[f"{module}.scale"], places[name], places[f"{module}.scale"]
            for part, value in pack(rows, 2 * half, rng).items():
                tensors[f"{module}.{part}"] = value
                places[f"{module}.{part}"] = file
        save_file(tensors, folder / file)
    index_path.write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = dict(method)
    (folder / "config.json").write_text(json.dumps(config))


def _adapter(folder: Path) -> Path:
    """A LoRA adapter of rank 4 in PEFT's layout: a dense and an expert matrix, a layer's experts in
    one parameter, and a whole norm.
    """
    folder.mkdir()
    tensors = {"base_model.model.model.norm.weight": torch.ones(128)}
    for half, shape in (("A", (16, 128)), ("B", (256, 16))):
        name = f"base_model.model.model.layers.1.mlp.experts.lora_{half}.weight"
        tensors[name] = torch.full(shape, 0.01)
    for module in ("layers.1.attn.wq_a", f"{_EXPERTS}1.w2"):
        for half, shape in (("A", (4, 128)), ("B", (128, 4))):
            tensors[f"base_model.model.{module}.lora_{half}.weight"] = torch.full(shape, 0.01)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def _v41(source: Path, folder: Path) -> None:
    """V4.1, with tokenizer and Engram tables; what only a small model says is as in the release."""
    shutil.copytree(source.parent / "v41-tiny", folder)
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"]
    text["swiglu_limit"] = 10.0
    text["rope_scaling"]["original_max_position_embeddings"] = 65536
    (folder / "config.json").write_text(json.dumps(config))


CHECKPOINT_SEEDS: tuple[CheckpointSeed, ...] = (
    CheckpointSeed("release", _copied),
    CheckpointSeed("V4.1", _v41),
    CheckpointSeed("release with adapter", _copied, _adapter),
    *(
        CheckpointSeed(f"{scheme} ({layout})", partial(_quant, scheme, layout))
        for scheme, layout in (
            ("int4-g32", "compressed-tensors"), ("mxfp4", "compressed-tensors"),
            ("nvfp4", "modelopt"), ("bf16", "deepseek"), ("mxfp4", "gguf"), ("q8_0", "gguf"),
            ("iq4_nl", "gguf"),
        )
    ),
    CheckpointSeed("gptq", partial(_packed, _gptq, {"quant_method": "gptq", "bits": 4})),
    CheckpointSeed("awq", partial(_packed, _awq, {"quant_method": "awq", "bits": 4})),
    CheckpointSeed("int4, asymmetric", partial(_packed, _asymmetric, {"quant_method": "x"})),
    CheckpointSeed("int8", partial(_packed, _int8, {"quant_method": "compressed-tensors"})),
    CheckpointSeed("modelopt", partial(_packed, _modelopt, {"quant_method": "modelopt"})),
)  # fmt: skip
