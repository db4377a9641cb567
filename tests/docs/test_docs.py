"""The documents hold: their Python runs, their commands work, their links lead somewhere."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the examples start from."""
    from trivium.models import digits

    train, _, test, labels = digits.split()
    shutil.copyfile(digits.cnn(), tmp_path / "model.onnx")
    np.savez(tmp_path / "calib.npz", image=train[:128])
    np.savez(tmp_path / "test.npz", image=test, y=labels)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/python.md", "docs/recovery.md"])
def test_python_blocks_run(page: str, folder: Path) -> None:
    source = "\n".join(blocks(page, "python"))
    assert source
    exec(compile(source, page, "exec"), {"__name__": "__main__"})


@pytest.mark.slow
@pytest.mark.xdist_group("tpu")
@pytest.mark.parametrize("page", ["README.md", "docs/recovery.md"])
def test_commands_work(page: str, folder: Path) -> None:
    lines = "\n".join(blocks(page, "console")).splitlines()
    commands = [line[2:] for line in lines if line.startswith("$ trivium ")]
    assert len(commands) > 4
    for command in commands:
        words = [sys.executable, "-m", "trivium.compiler.cli", *shlex.split(command)[1:]]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stderr}"


@pytest.mark.slow
def test_the_page_on_quantization(folder: Path) -> None:
    from trivium.compiler import recipe

    page = "docs/quantization.md"
    (table,) = blocks(page, "toml")
    assert recipe.parse(table).steps[0].name == "quantize-weights"
    images = np.load("calib.npz")["image"][:8]
    for source in blocks(page, "python"):
        exec(compile(source, page, "exec"), {"stream": lambda: iter(np.split(images, 8))})
    lines = "\n".join(blocks(page, "console")).splitlines()
    commands = [line[2:] for line in lines if line.startswith("$ ") and "checkpoint" not in line]
    assert len(commands) >= 3
    for command in commands:
        words = [sys.executable, "-m", "trivium.compiler.cli", *shlex.split(command)[1:]]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stderr}"


@pytest.mark.slow
@pytest.mark.parametrize("page", ["docs/explain.md", "docs/planning.md"])
def test_commands_of_the_guides_work(page: str, folder: Path) -> None:
    (folder / "prices.toml").write_text("".join(blocks("docs/planning.md", "toml")))
    (folder / "own.py").write_text("".join(blocks("docs/explain.md", "python")))
    lines = "\n".join(blocks(page, "console")).splitlines()
    commands = [line[2:] for line in lines if line.startswith("$ trivium ")]
    commands = [command for command in commands if "CHECKPOINT" not in command]
    commands += ["trivium eval model.onnx --data test.npz --metric map:own.py:worst"]
    assert len(commands) > 4
    for command in commands:
        words = [sys.executable, "-m", "trivium.compiler.cli", *shlex.split(command)[1:]]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stderr}"


def test_generated_pages_and_links() -> None:
    done = subprocess.run(
        [sys.executable, "docs/generate.py", "--check"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.environ.get("PYTHONPATH", "")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
