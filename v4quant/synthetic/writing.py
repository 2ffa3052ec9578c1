"""Writing a synthetic checkpoint: shards tensor by tensor, then config and, last, the index.

Header-only mode writes the true headers and lets the file system pretend the data: a sparse file of
the right size whose bytes read as zeros. A complete Pro is then a few megabytes of disk.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from v4quant.synthetic.configs import make_config
from v4quant.synthetic.errors import RequestError
from v4quant.synthetic.inventory import shards_of
from v4quant.synthetic.tokenizer import HEAD_TOKENS, make_tokenizer, special_tokens
from v4quant.synthetic.values import Faults, pieces
from v4quant_formats.checkpoint import INDEX_NAME
from v4quant_formats.manifest import index_json
from v4quant_formats.shards import ShardWriter, plan_shard, write_file_atomically
from v4quant_formats.spec import TensorSpec

GENERATION_CONFIG = {
    "_from_model_config": True,
    "bos_token_id": 0,
    "do_sample": True,
    "eos_token_id": 1,
    "temperature": 1.0,
    "top_p": 1.0,
    "transformers_version": "4.57.1",
}
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": HEAD_TOKENS[0],
    "eos_token": HEAD_TOKENS[1],
    "pad_token": HEAD_TOKENS[2],
    "add_bos_token": False,
    "clean_up_tokenization_spaces": False,
}


@dataclass(frozen=True)
class Request:
    """A checkpoint to make; see the command line for the meaning of each part."""

    release: str
    tiny: bool = True
    overrides: tuple[tuple[str, int], ...] = ()
    engram_rows: int | None = None
    seed: int = 0
    headers_only: bool = False
    faults: Faults = field(default_factory=Faults)


@dataclass(frozen=True)
class Written:
    """What was written (`--json`)."""

    output: str
    release: str
    files: int
    tensors: int
    bytes: int
    dtypes: dict[str, int]
    headers_only: bool
    planted: list[str]


def write_checkpoint(out: Path, request: Request) -> Written:
    """Write a checkpoint folder. Raises RequestError, or OutputError when the disk refuses."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RequestError(f"{out} is not an empty folder; choose another --out")
    config = make_config(
        request.release, request.tiny, dict(request.overrides), request.engram_rows
    )
    shards = shards_of(request.release, config)
    _check(request, config, shards)
    out.mkdir(parents=True, exist_ok=True)
    experts = int(config.get("n_routed_experts", 0))
    weight_map: dict[str, str] = {}
    for number, specs in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        if request.headers_only:
            _write_header(out / name, specs)
        else:
            _write_shard(out / name, specs, experts, request)
        weight_map |= dict.fromkeys((s.name for s in specs), name)
    total = sum(s.nbytes for specs in shards for s in specs)
    _write_json(out / "config.json", config)
    _write_json(out / "generation_config.json", GENERATION_CONFIG)
    if request.release == "v41":
        _write_tokenizer(out, config)
    write_file_atomically(out / INDEX_NAME, index_json(weight_map, total))
    return Written(
        output=str(out),
        release=request.release,
        files=len(shards),
        tensors=len(weight_map),
        bytes=total,
        dtypes=dict(Counter(s.dtype for specs in shards for s in specs)),
        headers_only=request.headers_only,
        planted=list(request.faults.modules) if request.faults.rows() else [],
    )


def _check(
    request: Request, config: Mapping[str, Any], shards: Iterable[Iterable[TensorSpec]]
) -> None:
    text = config.get("text_config", config)
    multiples = {"hidden_size": 32, "moe_intermediate_size": 32, "engram_head_dim": 32}
    for key, step in multiples.items():
        if text.get(key, step) % step:
            raise RequestError(f"{key} = {text[key]} must be a multiple of {step}")
    if text["num_experts_per_tok"] > text["n_routed_experts"]:
        raise RequestError("there must be at least num_experts_per_tok experts")
    if not request.faults.rows():
        return
    if request.headers_only:
        raise RequestError("header-only files have no data to plant anything in")
    if not 0 <= (request.faults.spread or 0) <= 121:
        raise RequestError("--spread must be between 0 and 121 octaves")
    matrices = {s.name for specs in shards for s in specs if s.dtype == "I8" and s.shape[0] > 8}
    for module in request.faults.modules:
        if f"{module}.weight" not in matrices:
            raise RequestError(f"'{module}' is not an FP4 expert matrix of at least 9 rows here")


def _write_shard(path: Path, specs: list[TensorSpec], experts: int, request: Request) -> None:
    writer = ShardWriter(path, plan_shard(specs))
    try:
        for spec in specs:
            position = 0
            for piece in pieces(spec, request.seed, experts, request.faults):
                writer.add_piece(spec.name, position, piece)
                position += piece.numel() * piece.element_size()
    except BaseException:
        writer.abort()
        raise
    writer.close()


def _write_header(path: Path, specs: list[TensorSpec]) -> None:
    plan = plan_shard(specs)
    with path.open("wb") as file:
        file.write(plan.header)
        file.truncate(plan.nbytes)


def _write_tokenizer(out: Path, config: Mapping[str, Any]) -> None:
    """The tokenizer that Engram's rows are hashed from."""
    text, image = config["text_config"], config["image_token_id"]
    specials = special_tokens(text["vocab_size"], text["dspark_noise_token_id"], image)
    compressed = text["engram_compressed_vocab_size"]
    tokenizer = make_tokenizer(text["vocab_size"], compressed, specials)
    write_file_atomically(out / "tokenizer.json", tokenizer.to_str().encode())
    _write_json(out / "tokenizer_config.json", TOKENIZER_CONFIG)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_file_atomically(path, (json.dumps(value, indent=2) + "\n").encode())
