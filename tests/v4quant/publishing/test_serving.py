"""The command that `run` ends with serves what it made, whatever the folder is called."""

from __future__ import annotations

import shlex

import pytest

from v4quant import shell
from v4quant.publishing.serving import serve_command
from v4quant_formats.layouts.table import LAYOUTS


@pytest.mark.parametrize("format_", ["deepseek", "modelopt", "compressed-tensors", "gguf"])
def test_a_folder_with_spaces_is_one_word(format_: str) -> None:
    line = serve_command(LAYOUTS[format_], "/data/my models/$out", "x-00001-of-00002.gguf", False)
    place = "/data/my models/$out" + ("/x-00001-of-00002.gguf" if format_ == "gguf" else "")
    assert shlex.split(line)[-1] == place


def test_a_published_file_is_served_from_its_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = serve_command(LAYOUTS["gguf"], "me/Model-GGUF", "Model-Q4_K.gguf", True)
    assert gguf == "llama-server -hf me/Model-GGUF"
    assert serve_command(LAYOUTS["deepseek"], "me/Model", "m", True) == "vllm serve me/Model"
    monkeypatch.setattr(shell, "own_shell", lambda: "cmd")
    assert '"C:\\my models/Model.gguf"' in serve_command(
        LAYOUTS["gguf"], "C:\\my models", "Model.gguf", False
    )
    sglang = LAYOUTS["compressed-tensors"].variants["sglang"]
    assert serve_command(sglang, "out", "m", False).startswith("SGLANG_DSV4_FP4_EXPERTS=0 python")
