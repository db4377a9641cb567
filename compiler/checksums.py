"""Checksums of files, and which large files need not be read again for theirs.

Hashing weights takes longer than loading them. A large file that was read and found right is
remembered by what the system says of it (device, inode, size, times); it is read again as soon as
any of that changes. What is remembered is lost without harm.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

from trivium.compiler import files
from trivium.compiler.errors import TriviumError

_CHUNK = 8 << 20
LARGE = 1 << 20
"""Bytes from which a file is worth remembering."""

_KNOWN = "checked.json"
_MOST = 1000
_SETTLED_S = 2.0
"""Seconds after which a further write surely gives a file other times."""


def file_hash(file: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def matches(file: Path, expected: str, *, afresh: bool = False) -> bool:
    """Whether the SHA-256 of a file is the expected one.

    Args:
        afresh: Read it whatever is remembered.
    """
    state = os.stat(file)
    if state.st_size < LARGE:
        return file_hash(file) == expected
    if not afresh and _remembered().get(_key(file)) == [*_identity(state), expected]:
        return True
    if file_hash(file) != expected:
        return False
    _remember(file, state, expected)
    return True


def note(folder: Path, expected: Mapping[str, str]) -> None:
    """Remember the large files of a folder that were just written and hashed."""
    for name, checksum in expected.items():
        state = os.stat(folder / name)
        if state.st_size >= LARGE:
            _remember(folder / name, state, checksum)


def _identity(state: os.stat_result) -> list[int]:
    return [state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns]


def _home() -> Path:
    from trivium.compiler.cache import folder

    return folder()


def _remembered() -> dict[str, object]:
    try:
        known = json.loads((_home() / _KNOWN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _remember(file: Path, state: os.stat_result, checksum: str) -> None:
    # A write right after the last one may leave the times as they are.
    settled = time.time() - max(state.st_mtime, state.st_ctime) > _SETTLED_S
    if not settled or _identity(os.stat(file)) != _identity(state):
        return
    known = _remembered()
    known.pop(_key(file), None)
    kept = [*known.items(), (_key(file), [*_identity(state), checksum])][-_MOST:]
    try:
        _home().mkdir(parents=True, exist_ok=True)
        files.write_text(_home() / _KNOWN, json.dumps(dict(kept)))
    except (OSError, TriviumError):
        return  # it is read again next time


def _key(file: Path) -> str:
    return str(file.resolve())
