"""docs/generation.md, run: its commands and its Python, in order."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("tokenizers", reason="tokenizers is not installed (pip install 'trivium[hf]')")

from trivium.compiler import cli

PAGE = Path(__file__).parents[2] / "docs" / "generation.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def test_page_runs(
    shared_data: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(shared_data("llm-shakespeare"), tmp_path / "folder")
    (tmp_path / "prompts.txt").write_text("ROMEO:\nJULIET:\n")
    monkeypatch.chdir(tmp_path)
    ran = 0
    for command in re.findall(r"^\$ trivium (.*)", "".join(blocks("console")), re.MULTILINE):
        arguments = shlex.split(command)
        cli.make_parser().parse_args(arguments)
        # The devices' compilers have tests of their own, and a server never ends.
        if arguments[0] == "serve" or {"tpu-v5e:2x2", "nvidia-h100-sxm"} & set(arguments):
            continue
        assert cli.main(arguments) == 0
        assert capsys.readouterr().out
        ran += 1
    assert ran == 6
    names: dict[str, object] = {}
    for block in blocks("python"):
        exec(block, names)
