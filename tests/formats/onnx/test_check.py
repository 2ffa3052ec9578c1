"""Folders of ONNX graphs as strangers might send them: every defect is a line, nothing escapes."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from v4quant_formats.onnx.check import OnnxError, check_onnx_folder, cpu_refusal, read_model
from v4quant_formats.onnx.graph import MICROSOFT, Graph
from v4quant_formats.spec import TensorSpec

onnx = pytest.importorskip("onnx")

DATA = "weights.safetensors"


def write_good(folder: Path) -> Path:
    """y = x * w, with 64 floats of w at byte 8 of a file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DATA).write_bytes(bytes(8) + np.arange(64, dtype=np.float32).tobytes())
    graph = Graph("good")
    x = graph.input("x", "F32", ["tokens", 64])
    w = graph.stored(TensorSpec("w", "F32", (64,), DATA, 8))
    graph.output("y", graph.node("Mul", x, w), "F32", ["tokens", 64])
    path = folder / "good.onnx"
    path.write_bytes(graph.model("", {}))
    return path


def damage(folder: Path, change: Callable[[Any], None]) -> list[str]:
    """Change the good model's message; what the check then says."""
    path = write_good(folder)
    model = read_model(path)
    change(model)
    path.write_bytes(model.SerializeToString())
    return [f"{p.where}: {p.problem}" for p in check_onnx_folder(folder).problems]


def place(key: str, value: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for entry in model.graph.initializer[0].external_data:
            if entry.key == key:
                entry.value = value

    return change


def test_a_good_folder(tmp_path: Path) -> None:
    write_good(tmp_path)
    report = check_onnx_folder(tmp_path)
    assert report.problems == ()
    (graph,) = report.graphs
    assert graph.inputs == {"x": "FLOAT [tokens, 64]"}
    assert graph.operators == {"Identity": 1, "Mul": 1}
    assert (graph.opset, graph.external_bytes) == (21, 256)


@pytest.mark.parametrize(
    "location",
    ["../secret", "/etc/passwd", "a/b", "", ".", "..", "c:\\x", "x\0y", "n" * 300, "a\nb"],
)
def test_locations_that_leave_the_folder(location: str, tmp_path: Path) -> None:
    (line,) = damage(tmp_path / "m", place("location", location))
    assert "not a file name inside the folder" in line and line.startswith("w:")


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("location", "absent.bin", "is missing"),
        ("offset", "-8", "not a number"),
        ("offset", "9" * 40, "not a number"),
        ("offset", "1e3", "not a number"),
        ("offset", "²", "not a number"),
        ("offset", "16", "cut short"),
        ("offset", "9223372036854775807", "cut short"),
        ("length", "255", "type and shape imply 256"),
        ("length", "", "not a number"),
    ],
)
def test_places_that_lie(key: str, value: str, text: str, tmp_path: Path) -> None:
    (line,) = damage(tmp_path, place(key, value))
    assert text in line


def test_links(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(1000))
    folder = tmp_path / "m"
    path = write_good(folder)
    (folder / DATA).unlink()
    (folder / DATA).symlink_to(tmp_path / "secret")
    (problem,) = check_onnx_folder(folder).problems
    assert "not a file name inside the folder" in problem.problem
    path.rename(tmp_path / "outside.onnx")
    (folder / "good.onnx").symlink_to(tmp_path / "outside.onnx")
    (problem,) = check_onnx_folder(folder).problems
    assert "leaves the folder" in problem.problem


def dims(*values: int) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        model.graph.initializer[0].dims[:] = values

    return change


def opset(version: int) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        model.opset_import[0].version = version

    return change


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dims(-64), "not possible"),
        (dims(2**40, 2**40), "not possible"),
        (dims(65), "imply 260"),
        (lambda m: setattr(m.graph.initializer[0], "data_type", 99), "not possible"),
        (opset(7), "outside 21"),
        (opset(2**40), "outside 21"),
        (lambda m: m.opset_import.add(domain="evil.example", version=1), "evil.example"),
        (lambda m: m.graph.ClearField("output"), "no output"),
        (lambda m: m.graph.initializer.append(m.graph.initializer[0]), "one name"),
        (lambda m: m.graph.node[0].input.append("nowhere"), "onnx.checker"),
        (lambda m: setattr(m.graph.node[0], "op_type", "Mull"), "onnx.checker"),
        (lambda m: m.graph.ClearField("name"), "onnx.checker"),
    ],
)
def test_graphs_that_lie(change: Callable[[Any], None], text: str, tmp_path: Path) -> None:
    lines = damage(tmp_path, change)
    assert any(text in line for line in lines), lines


def test_bodies_of_loops_are_looked_into(tmp_path: Path) -> None:
    path = write_good(tmp_path)
    model = read_model(path)
    inner = onnx.GraphProto()
    inner.CopyFrom(model.graph)
    inner.initializer[0].external_data[0].value = "../secret"
    model.graph.node.add(op_type="Loop").attribute.add(name="body", type=5, g=inner)
    path.write_bytes(model.SerializeToString())
    assert "inside the folder" in str(check_onnx_folder(tmp_path).problems)


@pytest.mark.parametrize("data", [b"", b"\xff" * 50, b"<html>", b"\x08\x0a"], ids=repr)
def test_files_that_are_no_model(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(data)
    (problem,) = check_onnx_folder(tmp_path).problems
    assert "x.onnx" in problem.problem
    with pytest.raises(OnnxError, match=r"x\.onnx"):
        read_model(tmp_path / "x.onnx")


def test_names_that_are_not_text(tmp_path: Path) -> None:
    path = write_good(tmp_path)
    path.write_bytes(path.read_bytes().replace(b"tokens", b"token\xff"))
    (problem,) = check_onnx_folder(tmp_path).problems
    assert "not UTF-8" in problem.problem


def test_folders_without_graphs(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(OnnxError, match=r"no \.onnx file"):
            check_onnx_folder(folder)
    (tmp_path / "folder.onnx").mkdir()
    assert "not a file" in check_onnx_folder(tmp_path).problems[0].problem


def test_random_damage_never_escapes(tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    good = write_good(tmp_path).read_bytes()
    for _ in range(150):
        data = bytearray(good)
        for _ in range(rng.randint(1, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        (tmp_path / "good.onnx").write_bytes(data[: rng.randint(1, len(data))])
        check_onnx_folder(tmp_path)  # a report, whatever it says


REFUSED = [
    ("DequantizeLinear", "", {}, 23, "FLOAT4E2M1"),
    ("DequantizeLinear", "", {}, 16, "scales"),
    ("DequantizeLinear", "", {}, 24, "scales"),
    ("MatMulNBits", MICROSOFT, {"bits": 3}, 1, "3 bits"),
    ("MatMulBlockQuantizedFp4Weight", MICROSOFT, {}, 1, "no CPU kernel"),
    ("QMoE", MICROSOFT, {"quant_type": "nvfp4"}, 1, "nvfp4"),
    ("QMoE", MICROSOFT, {"expert_weight_bits": 3}, 1, "3 bits"),
    ("QMoE", MICROSOFT, {"activation_type": "swiglu"}, 1, "swiglu_fusion"),
    ("QMoE", MICROSOFT, {"activation_type": "swiglu", "swiglu_fusion": 2}, 1, "swiglu_fusion"),
]


@pytest.mark.parametrize(("op", "domain", "attributes", "kind", "text"), REFUSED)
def test_what_cpu_kernels_refuse(
    op: str, domain: str, attributes: dict[str, Any], kind: int, text: str
) -> None:
    node = onnx.helper.make_node(op, ["x", "s"], ["y"], domain=domain, **attributes)
    refusal = cpu_refusal(node, {"s": onnx.TensorProto(data_type=kind)})
    assert refusal is not None and text in refusal


def test_what_cpu_kernels_take() -> None:
    for op, domain, attributes in (
        ("DequantizeLinear", "", {}),
        ("MatMulNBits", MICROSOFT, {"bits": 2}),
        ("QMoE", MICROSOFT, {"activation_type": "swiglu", "swiglu_fusion": 1}),
        ("Mul", "", {}),
    ):
        node = onnx.helper.make_node(op, ["x", "s"], ["y"], domain=domain, **attributes)
        assert cpu_refusal(node, {"s": onnx.TensorProto(data_type=1)}) is None


@pytest.mark.parametrize(
    ("scales", "fits"),
    [
        ((4, 64, 2), True),
        ((4, 64, 4), False),
        ((4, 32, 2), False),
        ((3, 64, 2), False),
        ((4,), False),
    ],
)
def test_qmoe_codes_and_scales_must_agree(scales: tuple[int, ...], fits: bool) -> None:
    node = onnx.helper.make_node(
        "QMoE", ["x", "p", "c", "s", "", "c2", "s2"], ["y"], domain=MICROSOFT,
        activation_type="swiglu", swiglu_fusion=1, block_size=32,
    )  # fmt: skip
    tensors = {
        "c": onnx.TensorProto(dims=(4, 64, 32), data_type=2),
        "s": onnx.TensorProto(dims=scales, data_type=1),
    }
    refusal = cpu_refusal(node, tensors)
    assert (refusal is None) == fits
