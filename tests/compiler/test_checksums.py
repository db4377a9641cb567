"""Which files are read for their checksums."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from trivium.compiler import checksums


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRIVIUM_CACHE", str(tmp_path / "home"))
    monkeypatch.setattr(checksums, "LARGE", 16)
    monkeypatch.setattr(checksums, "_SETTLED_S", 0.0)
    return tmp_path / "home"


def _reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    read: list[Path] = []
    hashed = checksums.file_hash

    def noted(file: Path) -> str:
        read.append(file)
        return hashed(file)

    monkeypatch.setattr(checksums, "file_hash", noted)
    return read


def test_a_large_file_is_read_once(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(100))
    expected = checksums.file_hash(file)
    read = _reads(monkeypatch)
    assert checksums.matches(file, expected)
    assert checksums.matches(file, expected)
    assert read == [file]
    assert checksums.matches(file, expected, afresh=True)
    assert read == [file, file]
    assert not checksums.matches(file, "other")


def test_a_changed_file_is_read_again(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(100))
    expected = checksums.file_hash(file)
    before = os.stat(file)
    assert checksums.matches(file, expected)
    file.write_bytes(bytes(99) + b"1")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not checksums.matches(file, expected)


def test_small_and_fresh_files_are_not_remembered(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checksums, "_SETTLED_S", 60.0)
    for name, size in (("small", 15), ("fresh", 100)):
        (tmp_path / name).write_bytes(bytes(size))
        assert checksums.matches(tmp_path / name, checksums.file_hash(tmp_path / name))
    assert not home.exists()


def test_what_is_remembered_may_be_damaged(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(100))
    expected = checksums.file_hash(file)
    home.mkdir()
    for damaged in ("", "[1]", '{"x": 1}'):
        (home / "checked.json").write_text(damaged)
        assert checksums.matches(file, expected)
    checksums.note(tmp_path, {"weights": expected})
    assert checksums.matches(file, expected)
