"""Scripts that convert, calibrate, evaluate or verify do it by the library's functions."""

from __future__ import annotations

import ast
from pathlib import Path

import v4quant

ROOT = Path(v4quant.__file__).parents[1]
API = ROOT / "v4quant" / "api"
# What stands behind the verbs: a script that imports it repeats what a verb does.
BEHIND = (
    "v4quant.allocation", "v4quant.calibration", "v4quant.checks", "v4quant.conversion",
    "v4quant.evaluation", "v4quant.onnx_export", "v4quant.pipeline", "v4quant.publishing",
    "v4quant_calibration.solve", "v4quant_calibration.statistics",
)  # fmt: skip
# Verbs whose work is in none of these rooms.
WITHOUT_ROOMS = {"v4quant.api.chat", "v4quant.api.planning"}
EXCEPTIONS = {
    ("full_scale.py", "v4quant.checks"): "decodes with the decoder that shares no code with verify",
    ("full_scale.py", "v4quant.conversion"): "reads a manifest's rows",
    ("gen_cli_docs.py", "v4quant.pipeline"): "lists the keys of a run file",
    ("quality_table.py", "v4quant_calibration.solve"): "a column without refinement, which "
    "`calibrate` always does",
    ("script_tools/curve.py", "v4quant.evaluation"): "draws with the report's plots",
    ("script_tools/readers.py", "*"): "the fuzzer's readers are the single readers of small files",
    ("script_tools/tool_readers.py", "*"): "those of other tools' files",
    ("script_tools/work_readers.py", "*"): "those of the records that commands keep",
}


def used(file: Path) -> set[str]:
    """The rooms behind the library from which a file imports."""
    modules = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            modules.add(node.module)
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
    return {room for room in BEHIND for m in modules if m == room or m.startswith(f"{room}.")}


def test_scripts_call_the_library() -> None:
    found = {
        (file.relative_to(folder).as_posix(), room)
        for folder in (ROOT / "scripts", ROOT / "examples")
        for file in folder.rglob("*.py")
        for room in used(file)
    }
    whole = {name for name, room in EXCEPTIONS if room == "*"}
    told = {(name, "*" if name in whole else room) for name, room in found}
    assert told == set(EXCEPTIONS), sorted(told ^ set(EXCEPTIONS))


def test_every_verb_is_guarded() -> None:
    """Whatever a verb calls lies in one of the rooms above, so that no script can go around it."""
    verbs = {name for name in v4quant.__all__ if name.islower() and name != "open_checkpoint"}
    homes = {v4quant._HOMES[verb] for verb in verbs}
    for home in homes:
        path = ROOT.joinpath(*home.split(".")).with_suffix(".py")
        assert used(path) or home.startswith(BEHIND) or home in WITHOUT_ROOMS, home
