"""export-onnx: decided from headers, safe against kill, refused with what works."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import v4quant
import v4quant.onnx_export.export
from tests.support.conversion import TINY, folder_bytes
from tests.support.shard_bytes import EditableCheckpoint
from tests.support.synthetic import RELEASES, make_small
from v4quant.cli import cli
from v4quant.conversion.journal import begin_journal
from v4quant.onnx_export.export import OnnxResult, export_onnx
from v4quant.onnx_export.plan import MANIFEST, make_onnx_plan
from v4quant_formats.errors import MissingTensor, OutputError, UnsupportedPair, WrongDtype
from v4quant_formats.model_config import ConfigError
from v4quant_formats.onnx.check import check_onnx_folder, read_model
from v4quant_formats.opening import open_checkpoint
from v4quant_kernels.errors import NonFiniteWeight, V4QuantError

pytest.importorskip("onnx")


def export(
    source: Path, out: Path, scheme: str = "mxfp4", *layers: str, workers: int = 2
) -> OnnxResult:
    with open_checkpoint(source) as checkpoint:
        return export_onnx(make_onnx_plan(checkpoint, scheme, layers), out, None, workers)


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("scheme", ["mxfp4", "int4-g32"])
def test_every_release(release: str, scheme: str, tmp_path: Path) -> None:
    source = make_small(tmp_path / "source", release, layers=4)
    result = export(source, tmp_path / "out", scheme, "0", "3")
    report = check_onnx_folder(tmp_path / "out")
    assert report.problems == () and len(report.graphs) == 5
    exact = scheme == "mxfp4" and not release.endswith("base")
    assert (result.lossy_modules == 0) == exact
    assert result.exact_modules + result.lossy_modules == 2 * 2 * 3
    assert exact or 0 < result.mean_relative_rms < 0.2


def test_same_bytes_for_any_number_of_workers(tmp_path: Path) -> None:
    export(TINY, tmp_path / "1", "int4-g32", "1", workers=1)
    export(TINY, tmp_path / "3", "int4-g32", "1", workers=3)
    assert folder_bytes(tmp_path / "1") == folder_bytes(tmp_path / "3")


def test_overwrite_puts_one_in_the_place_of_another(tmp_path: Path) -> None:
    out, plain = tmp_path / "out", tmp_path / "plain"
    export(TINY, out, "mxfp4", "0")
    export(TINY, plain, "int4-g32", "1")
    wanted = {"scheme": "int4-g32", "layers": [1]}
    with pytest.raises(OutputError, match="--overwrite"):
        v4quant.export_onnx(TINY, out, **wanted)
    (out / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"'mine\.txt'"):
        v4quant.export_onnx(TINY, out, overwrite=True, **wanted)
    (out / "mine.txt").unlink()
    done = v4quant.export_onnx(TINY, out, overwrite=True, **wanted)
    assert done.output == str(out) and folder_bytes(out) == folder_bytes(plain)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "plain"]


def test_result_and_manifest(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = export(TINY, out, "mxfp4", "0", "mtp.0")
    assert result.layers == ["layers.0", "mtp.0"]
    assert sorted(result.files) == sorted(p.name for p in out.iterdir())
    assert result.bytes_out == sum(p.stat().st_size for p in out.iterdir())
    manifest = json.loads((out / MANIFEST).read_text())
    assert {f["name"] for f in manifest["files"]} | {MANIFEST} == set(result.files)
    assert str(tmp_path) not in (out / MANIFEST).read_text()


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", ["experts", "close", "graphs"])
def test_killed_and_resumed(at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    export(TINY, whole, "mxfp4", "0", "1")
    name = {"experts": "write_expert", "close": "read_header", "graphs": "moe_model"}[at]
    real, calls = getattr(v4quant.onnx_export.export, name), []

    def die(*args: Any) -> Any:
        calls.append(args)
        if len(calls) > (5 if at == "experts" else 1):  # in the second layer
            raise Killed
        return real(*args)

    monkeypatch.setattr(v4quant.onnx_export.export, name, die)
    with pytest.raises(Killed):
        export(TINY, out, "mxfp4", "0", "1")
    assert not (out / MANIFEST).exists() and not (out / "layers.1.moe.onnx").exists()
    assert not list(out.glob("*.part"))
    (out / "layers.1.safetensors.0123abcd.part").write_bytes(b"left by a power cut")
    monkeypatch.setattr(v4quant.onnx_export.export, name, real)
    first = (out / "layers.0.safetensors").stat().st_mtime_ns
    export(TINY, out, "mxfp4", "0", "1")
    assert (out / "layers.0.safetensors").stat().st_mtime_ns == first
    assert folder_bytes(out) == folder_bytes(whole)


def test_again_changes_nothing_and_repairs_what_is_damaged(tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(TINY, out, "mxfp4", "0")
    before = folder_bytes(out)
    stamp = (out / "layers.0.safetensors").stat().st_mtime_ns
    export(TINY, out, "mxfp4", "0")
    assert (out / "layers.0.safetensors").stat().st_mtime_ns == stamp
    for name, data in (("layers.0.moe.onnx", b"\xff"), ("layers.0.safetensors", b"short")):
        (out / name).write_bytes(data)
        export(TINY, out, "mxfp4", "0")
        assert folder_bytes(out) == before


@pytest.mark.parametrize(
    "how", ["thesis.txt", "indexer.onnx", "layers.0.moe.onnx", MANIFEST, "finished", "unfinished"]
)
def test_folders_of_others(how: str, tmp_path: Path) -> None:
    """Also a user's file under the very name that this export would give it."""
    out = tmp_path / "out"
    if how not in ("finished", "unfinished"):
        out.mkdir()
        (out / how).write_text("mine")
    else:
        export(TINY, out, "int8-g32", "0")
        if how == "unfinished":
            (out / MANIFEST).unlink()
            begin_journal(out, "another plan", ["layers.0.moe.onnx"])
    before = folder_bytes(out)
    with pytest.raises(OutputError, match="which this export did not make"):
        export(TINY, out, "mxfp4", "0")
    assert folder_bytes(out) == before


@pytest.mark.parametrize("layer", ["4", "-1", "", "x", "layers.9", "mtp.1", "1.0", "²", "0 1"])
def test_layers_that_are_not_there(layer: str) -> None:
    with (
        open_checkpoint(TINY) as checkpoint,
        pytest.raises(UnsupportedPair, match=r"0 to 3, mtp\.0"),
    ):
        make_onnx_plan(checkpoint, "mxfp4", ["0", layer])


@pytest.mark.parametrize(("key", "value"), [("scoring_func", "softmax"), ("norm_topk_prob", False)])
def test_other_routers(key: str, value: object, tmp_path: Path) -> None:
    edited = EditableCheckpoint.read(TINY)
    edited.config[key] = value
    source = edited.write(tmp_path)
    with open_checkpoint(source) as checkpoint, pytest.raises(ConfigError, match=key):
        make_onnx_plan(checkpoint, "mxfp4")


def test_missing_expert(tmp_path: Path) -> None:
    edited = EditableCheckpoint.read(TINY)
    for part in ("weight", "scale"):
        edited.remove(f"layers.1.ffn.experts.3.w2.{part}")
    with open_checkpoint(edited.write(tmp_path)) as checkpoint:
        make_onnx_plan(checkpoint, "mxfp4", ["0"])
        with pytest.raises(MissingTensor, match=r"experts\.3\.w2"):
            make_onnx_plan(checkpoint, "mxfp4", ["1"])


def test_shapes_of_another_model(tmp_path: Path) -> None:
    edited = EditableCheckpoint.read(TINY)
    edited.config["moe_intermediate_size"] = 64
    source = edited.write(tmp_path)
    with open_checkpoint(source) as checkpoint, pytest.raises(WrongDtype, match="json implies"):
        make_onnx_plan(checkpoint, "mxfp4", ["1"])


@pytest.mark.parametrize("value", [4, -1, 2**62])
def test_tables_that_name_absent_experts(value: int, tmp_path: Path) -> None:
    edited = EditableCheckpoint.read(TINY)
    table = edited["layers.0.ffn.gate.tid2eid"]
    table.data = torch.tensor([value]).numpy().tobytes() + table.data[8:]
    with pytest.raises(WrongDtype, match="tid2eid"):
        export(edited.write(tmp_path / "source"), tmp_path / "out", "mxfp4", "0")
    assert not list((tmp_path / "out").glob("layers*"))


@pytest.mark.parametrize("name", ["layers.1.ffn.experts.2.w3.scale", "layers.1.ffn.gate.bias"])
def test_nan_is_refused(name: str, tmp_path: Path) -> None:
    edited = EditableCheckpoint.read(TINY)
    edited[name].data = b"\xff" * len(edited[name].data)
    with pytest.raises(NonFiniteWeight, match=name.removesuffix(".scale")):
        export(edited.write(tmp_path / "source"), tmp_path / "out", "mxfp4", "1")
    assert not list((tmp_path / "out").glob("layers*"))


def test_full_disk_is_seen_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(v4quant.onnx_export.export.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match=r"only 1\.0 kB are free"):
        export(TINY, tmp_path / "out", "mxfp4", "0")


def run_cli(*arguments: str, verb: str = "export-onnx") -> tuple[int, str]:
    outcome = CliRunner().invoke(cli, [verb, *arguments])
    if isinstance(outcome.exception, V4QuantError):
        return 1, str(outcome.exception)
    return outcome.exit_code, outcome.stdout


def test_command(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    arguments = [str(TINY), out, "--scheme", "int4-g32", "--layers", "0, 2", "--json"]
    code, text = run_cli(*arguments, "--dry-run")
    plan = json.loads(text)
    assert code == 0 and not Path(out).exists()
    code, text = run_cli(*arguments)
    result = json.loads(text)
    assert code == 0 and result["layers"] == plan["layers"] == ["layers.0", "layers.2"]
    assert result["files"] == plan["files"] and result["kernel"] == "qmoe"
    assert plan["bytes_out"] < result["bytes_out"] < plan["bytes_out"] + 200_000
    props = {p.key for p in read_model(Path(out) / "layers.0.moe.onnx").metadata_props}
    assert "v4quant.plan" in props
    code, text = run_cli(*arguments[:-1])
    assert code == 0 and "int4-g32 by qmoe" in text


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--scheme", "nvfp4"], "choose one of mxfp4"),
        (["--scheme", "int4"], "unknown scheme 'int4'"),
        (["--scheme", "mxfp4", "--kernel", "qmoe"], "choose lookup"),
        (["--scheme", "mxfp4", "--layers", "0,,1"], "there is no layer ''"),
        (["--scheme", "mxfp4", "--stats", "absent.v4q"], "absent.v4q"),
    ],
)
def test_command_refuses(options: list[str], text: str, tmp_path: Path) -> None:
    code, said = run_cli(str(TINY), str(tmp_path / "out"), *options)
    assert code == 1 and text in said
    assert not (tmp_path / "out").exists()


def test_verify_predicts_loading(tmp_path: Path) -> None:
    export(TINY, tmp_path, "mxfp4", "0")
    arguments = [str(tmp_path), "--engine", "onnxruntime"]
    code, text = run_cli(*arguments, verb="verify")
    assert code == 0 and "should load it" in text
    data = tmp_path / "layers.0.safetensors"
    data.write_bytes(data.read_bytes()[:-100])
    code, text = run_cli(*arguments, verb="verify")
    assert code == 3 and "cut short" in text and "NOT" in text
    code, text = run_cli(*arguments, "--json", verb="verify")
    found = json.loads(text)
    assert code == 3 and not found["loads"] and found["findings"]
