"""Exported ONNX layers in onnxruntime on the CPU, beside our own functions.

What is claimed: the graphs pass onnx's checker (shapes inferred), load, and compute what the
calibration model's router and experts compute on the same weights, whatever the number of tokens;
the indexer's scores are those of `v4quant_kernels.twins.indexer`.

Tolerance: 2e-6 of the largest output, a few float32 roundings of sums in another order. Measured:
up to 4e-7 on the trained model in MXFP4. A token whose router is undecided to 1e-5 may choose
another expert in another order of summation; such tokens are left out, and there are few.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.conversion import TINY, convert
from v4quant.onnx_export.export import export_onnx
from v4quant.onnx_export.plan import make_onnx_plan
from v4quant_calibration.forward.checkpoint_params import CheckpointParams
from v4quant_calibration.model.experts import mixture_of_experts
from v4quant_calibration.model.options import ForwardOptions
from v4quant_calibration.model.router import Routing, route
from v4quant_formats.model_config import load_model_config
from v4quant_formats.onnx.check import check_onnx_folder
from v4quant_formats.onnx.experts import (
    CODES2,
    CODES13,
    KERNELS,
    SCALES2,
    SCALES13,
    ExpertBlock,
    expert_pieces,
    expert_specs,
)
from v4quant_formats.onnx.graph import Graph
from v4quant_formats.onnx.indexer import indexer_model
from v4quant_formats.onnx.moe import MoeLayer, experts_model
from v4quant_formats.opening import open_checkpoint
from v4quant_formats.safetensors_header import read_header
from v4quant_formats.shards import ShardWriter, plan_shard
from v4quant_kernels import codec
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.scheme import SCHEMES
from v4quant_kernels.twins.indexer import indexer_logits, pack_index_keys, quantize_index_vectors

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

ROOT = Path(__file__).parents[2]
TINY_V4 = ROOT / "v4quant" / "data" / "tiny-v4"
TOLERANCE = 2e-6
PAIRS = [(scheme, kernel) for scheme, kernels in KERNELS.items() for kernel in kernels]


def run(model: Path | bytes, **inputs: Tensor) -> Tensor:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    source = model if isinstance(model, bytes) else str(model)
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    feed = {name: np.ascontiguousarray(value.numpy()) for name, value in inputs.items()}
    (result,) = session.run(None, feed)
    return torch.from_numpy(result)


def relative(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    return float((found.double() - wanted.double()).abs().max() / wanted.abs().max())


def export(source: Path, out: Path, scheme: str, *layers: str, kernel: str | None = None) -> Path:
    with open_checkpoint(source) as checkpoint:
        export_onnx(make_onnx_plan(checkpoint, scheme, layers, kernel), out)
    return out


def random_block(scheme: str, kernel: str, generator: torch.Generator, limit: float) -> ExpertBlock:
    sizes = torch.randint(1, 4, (2,), generator=generator).mul(128).tolist()
    experts = int(torch.randint(4, 9, (), generator=generator))
    return ExpertBlock(experts, *sizes, 3, limit, SCHEMES[scheme], kernel)  # type: ignore[arg-type]


def write_block(
    block: ExpertBlock, folder: Path, generator: torch.Generator
) -> list[tuple[QTensor, QTensor, QTensor]]:
    """Random experts, stored; int scales of either sign, as the search may choose them."""
    writer = ShardWriter(folder / "experts.safetensors", plan_shard(expert_specs(block)))
    experts = []
    for number in range(block.experts):
        matrices = []
        for rows, columns in (
            (block.intermediate, block.hidden),
            (block.intermediate, block.hidden),
            (block.hidden, block.intermediate),
        ):
            x = torch.randn(rows, columns, generator=generator) / columns**0.5 * 2
            q = codec.quantize(x, block.scheme)
            if block.scheme.element == "int":
                assert q.scale is not None
                sign = torch.randint(0, 2, q.scale.shape, generator=generator) * 2 - 1
                q = QTensor(q.scheme, q.shape, q.codes, q.scale * sign)
            matrices.append(q)
        w1, w3, w2 = matrices
        for name, first, data in expert_pieces(number, w1, w3, w2):
            writer.add_piece(name, first, data)
        experts.append((w1, w3, w2))
    writer.close()
    return experts


def reference64(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    experts: list[tuple[QTensor, QTensor, QTensor]],
    limit: float,
) -> Tensor:
    """Slot by slot in float64, sharing no code with the graphs."""
    y = torch.zeros(x.shape, dtype=torch.float64)
    dense = [[codec.dequantize(q).double() for q in expert] for expert in experts]
    for token in range(x.shape[0]):
        for expert, weight in zip(ids[token].tolist(), weights[token].double(), strict=True):
            w1, w3, w2 = dense[expert]
            row = x[token].double()
            gate, up = w1 @ row, w3 @ row
            if limit:
                gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            y[token] += w2 @ (gate / (1 + torch.exp(-gate)) * up) * weight
    return y


@pytest.mark.parametrize(("scheme", "kernel"), PAIRS)
@pytest.mark.parametrize("limit", [1.0, 0.0], ids=["clamped", "free"])
def test_random_experts(
    scheme: str, kernel: str, limit: float, tmp_path: Path, generator: torch.Generator
) -> None:
    block = random_block(scheme, kernel, generator, limit)
    experts = write_block(block, tmp_path, generator)
    layer = MoeLayer("layers.0", block, False, 1.5)
    path = tmp_path / "experts.onnx"
    path.write_bytes(experts_model(layer, read_header(tmp_path / "experts.safetensors"), {}))
    onnx.checker.check_model(str(path), full_check=True)
    for tokens in (0, 1, 37):
        x = torch.randn(tokens, block.hidden, generator=generator)
        # Drawn with repetition: a table may name an expert twice.
        ids = torch.randint(0, block.experts, (tokens, block.top_k), generator=generator)
        weights = torch.rand(tokens, block.top_k, generator=generator)
        y = run(path, x=x, expert_ids=ids, expert_weights=weights)
        assert y.shape == x.shape
        if tokens:
            assert relative(y, reference64(x, ids, weights, experts, limit)) < TOLERANCE


def decided(x: Tensor, params: CheckpointParams, stage: str, top_k: int) -> Tensor:
    """Tokens whose choice of experts does not hang on rounding."""
    scores = torch.nn.functional.softplus(x @ params(f"{stage}.ffn.gate").mT).sqrt()
    ordered = (scores + params(f"{stage}.ffn.gate.bias")).sort(-1, descending=True).values
    return ordered[:, top_k - 1] - ordered[:, top_k] > 1e-5


@pytest.mark.parametrize("case", ["int4-g32 qmoe", "int4-g32 matmulnbits", "mxfp4 lookup"])
def test_layers_of_the_trained_model(
    case: str, tmp_path: Path, generator: torch.Generator, trained_int4: Path
) -> None:
    scheme, kernel = case.split()
    out = export(TINY_V4, tmp_path / "onnx", scheme, "0", "4", "mtp.0", kernel=kernel)
    assert check_onnx_folder(out).problems == ()
    source = TINY_V4 if scheme == "mxfp4" else trained_int4
    config = load_model_config(source)
    with open_checkpoint(source) as checkpoint:
        params = CheckpointParams(checkpoint)
        for stage, hashed in (("layers.0", True), ("layers.4", False), ("mtp.0", False)):
            for tokens in (1, 50):
                x = torch.randn(tokens, config.hidden_size, generator=generator)
                token_ids = torch.randint(0, config.vocab_size, (tokens,), generator=generator)
                routing = route(x, token_ids, params, config.facts(stage), config)
                wanted = mixture_of_experts(
                    x, routing, params, stage, config, ForwardOptions(), None
                )
                feed = {"token_ids": token_ids} if hashed else {}
                y = run(out / f"{stage}.moe.onnx", x=x, **feed)
                keep = torch.ones(tokens, dtype=torch.bool)
                if not hashed:
                    keep = decided(x, params, stage, config.num_experts_per_tok)
                assert keep.sum() >= tokens - 3
                if keep.any():
                    assert relative(y[keep], wanted[keep]) < TOLERANCE, (stage, tokens)
                check_experts_alone(out, stage, x, routing, wanted, y, params)


def check_experts_alone(
    out: Path,
    stage: str,
    x: Tensor,
    routing: Routing,
    wanted: Tensor,
    y: Tensor,
    params: CheckpointParams,
) -> None:
    """The experts' graph on our routing; the rest of the layer is the shared expert."""
    routed = run(
        out / f"{stage}.experts.onnx",
        x=x, expert_ids=routing.expert_ids, expert_weights=routing.weights,
    )  # fmt: skip
    w1, w3, w2 = (params(f"{stage}.ffn.shared_experts.{w}") for w in ("w1", "w3", "w2"))
    gate, up = (x @ w1.mT).clamp(max=10), (x @ w3.mT).clamp(-10, 10)
    shared = torch.nn.functional.silu(gate) * up @ w2.mT
    assert relative(routed + shared, wanted) < TOLERANCE


@pytest.fixture(scope="module")
def trained_int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model by the main path, whose codes the export must meet."""
    out = tmp_path_factory.mktemp("onnx") / "int4"
    convert(TINY_V4, out, "int4-g32")
    return out


@pytest.mark.parametrize("form", ["mxfp4", "int4-g32", "bf16", "int8-g32", "mxfp4/gguf"])
def test_our_own_outputs_as_sources(
    form: str, tmp_path: Path, generator: torch.Generator, converted: Callable[[str], Path]
) -> None:
    """Dense matrices are FP8, BF16 or GGUF's by then; values stay those of the checkpoint."""
    source = converted(form)
    scheme = form if form in KERNELS else "mxfp4"
    out = export(source, tmp_path / "onnx", scheme, "1")
    config = load_model_config(source)
    with open_checkpoint(source) as checkpoint:
        params = CheckpointParams(checkpoint)
        x = torch.randn(20, config.hidden_size, generator=generator)
        routing = route(
            x, torch.zeros(20, dtype=torch.int64), params, config.facts("layers.1"), config
        )
        wanted = mixture_of_experts(x, routing, params, "layers.1", config, ForwardOptions(), None)
        keep = decided(x, params, "layers.1", config.num_experts_per_tok)
    assert relative(run(out / "layers.1.moe.onnx", x=x)[keep], wanted[keep]) < TOLERANCE


def test_exported_int4_codes_are_those_of_the_checkpoint(
    tmp_path: Path, converted: Callable[[str], Path]
) -> None:
    """Searched from the release or copied from our own conversion: the same bytes."""
    data: list[dict[str, Any]] = []
    for number, source in enumerate((TINY, converted("int4-g32"))):
        out = export(source, tmp_path / str(number), "int4-g32", "2")
        raw = (out / "layers.2.safetensors").read_bytes()
        specs = read_header(out / "layers.2.safetensors")
        data.append(
            {
                name: raw[specs[name].offset : specs[name].offset + specs[name].nbytes]
                for name in (CODES13, SCALES13, CODES2, SCALES2)
            }
        )
    assert data[0] == data[1]


@pytest.mark.parametrize("round_products", [False, True])
def test_indexer(round_products: bool, generator: torch.Generator) -> None:
    heads, dim = int(torch.randint(1, 65, (), generator=generator)), 128
    model = indexer_model(heads, dim, {}, round_products)
    onnx.checker.check_model(onnx.load_from_string(model), full_check=True)
    for tokens, keys in ((1, 1), (3, 0), (5, 300)):
        q = torch.randn(tokens, heads, dim, generator=generator)
        k = torch.randn(keys, dim, generator=generator)
        weights = torch.randn(tokens, heads, generator=generator) * (heads * dim) ** -0.5
        positions = torch.randint(0, 4 * keys + 5, (tokens,), generator=generator)
        codes, scale = quantize_index_vectors(q)
        packed = torch.empty(0, dim // 2 + dim // 32, dtype=torch.uint8)
        if keys:
            packed = pack_index_keys(*quantize_index_vectors(k))
        wanted = indexer_logits(codes, scale, packed, weights, positions, round_products)
        found = run(
            model,
            q_codes=codes, q_scale=scale.view(torch.uint8), k_packed=packed,
            head_weights=weights, positions=positions,
        )  # fmt: skip
        assert torch.equal(found.isinf(), wanted.isinf())
        seen = wanted.isfinite()
        assert bool((found[seen] < torch.inf).all())
        if seen.any():
            # bfloat16 may round a product to the other side when sums differ in the last bit.
            bound = (2e-3 if round_products else TOLERANCE) * float(scale_of(q, k, weights))
            assert float((found[seen] - wanted[seen]).abs().max()) < bound


def scale_of(q: Tensor, k: Tensor, weights: Tensor) -> Tensor:
    """The largest sum of magnitudes a score is made of."""
    products = (q @ k.mT).abs()
    return (weights.abs().unsqueeze(-1) * products).sum(1).max()


def refused_graph(case: str) -> bytes:
    """A graph the standard allows and the CPU kernels do not take."""
    graph = Graph("refused")
    helper = onnx.helper
    if case == "MatMulNBits of 3 bits":
        x = graph.input("x", "F32", ["tokens", 64])
        codes = graph.constant(np.zeros((8, 2, 12)), np.uint8)
        scales = graph.constant(np.ones((8, 2)), np.float32)
        y = graph.node(
            "MatMulNBits", x, codes, scales, domain="com.microsoft",
            K=64, N=8, bits=3, block_size=32,
        )  # fmt: skip
        graph.output("y", y, "F32", ["tokens", 8])
        return graph.model("", {})
    kind = {"FLOAT4E2M1": 23, "BFLOAT16 scale": 3}[case]
    codes = helper.make_tensor("codes", kind, [4, 32], [0] * 128)
    scale = helper.make_tensor("scale", 1 if kind == 23 else 16, [4, 1], [1.0] * 4)
    node = helper.make_node("DequantizeLinear", ["codes", "scale"], ["z"], axis=1, block_size=32)
    # The sum with an input keeps the runtime from folding it all.
    cast = helper.make_node("Cast", ["z"], ["f"], to=1)
    add = helper.make_node("Add", ["f", "x"], ["y"])
    value = helper.make_tensor_value_info
    built = helper.make_graph(
        [node, cast, add], "refused", [value("x", 1, [4, 32])], [value("y", 1, [4, 32])],
        [codes, scale],
    )  # fmt: skip
    data: bytes = helper.make_model(
        built, ir_version=11, opset_imports=[helper.make_opsetid("", 23)]
    ).SerializeToString()
    return data


@pytest.mark.parametrize("case", ["MatMulNBits of 3 bits", "FLOAT4E2M1", "BFLOAT16 scale"])
def test_the_check_refuses_what_the_runtime_refuses(case: str, tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(refused_graph(case))
    assert len(check_onnx_folder(tmp_path).problems) == 1
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    with pytest.raises(Exception, match=r"NOT_IMPLEMENTED|quantization is supported"):
        onnxruntime.InferenceSession(
            str(tmp_path / "x.onnx"), options, providers=["CPUExecutionProvider"]
        )
