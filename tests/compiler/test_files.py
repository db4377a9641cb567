"""Files that a user names, and the folders that a compile works in."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

import pytest

from trivium.compiler import files
from trivium.compiler.errors import BadInput

LONG_AGO = time.time() - 3600


def _abandon(folder: Path) -> None:
    (folder / "half").touch()
    os.utime(folder, (LONG_AGO, LONG_AGO))


def test_a_killed_process_is_cleaned_up_after(tmp_path: Path) -> None:
    left = tmp_path / ".trivium-left"
    left.mkdir()
    _abandon(left)
    (tmp_path / ".other").mkdir()
    with files.workspace(tmp_path) as folder:
        assert sorted(tmp_path.iterdir()) == sorted([folder, tmp_path / ".other"])
    assert list(tmp_path.iterdir()) == [tmp_path / ".other"]


def test_a_living_one_is_let_be(tmp_path: Path) -> None:
    with files.workspace(tmp_path) as long_at_work:
        _abandon(long_at_work)
        with files.workspace(tmp_path):
            pass
        assert (long_at_work / "half").is_file()


def test_a_young_one_is_let_be(tmp_path: Path) -> None:
    """It may not have come to its lock yet."""
    young = tmp_path / ".trivium-young"
    young.mkdir()
    with files.workspace(tmp_path):
        pass
    assert young.is_dir()


def test_replacing_is_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with suppress(RuntimeError), files.replacing(path) as folder:
        (folder / "file").write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    with files.replacing(path) as folder:
        (folder / "file").write_text("new")
        (folder / "file.data").write_text("more")
    assert path.read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "file.data"]


def test_inside(tmp_path: Path) -> None:
    (tmp_path / "up").symlink_to("..")
    assert files.inside(tmp_path, "a/../b") == tmp_path.resolve() / "b"
    for name in ("..", "../x", "/etc/passwd", "up/x", "x\0y"):
        assert files.inside(tmp_path, name) is None


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BadInput, match="a pipe or a device"):
        files.read_json(tmp_path / "pipe")
