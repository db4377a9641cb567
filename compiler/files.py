"""Touching files that somebody else named: read only what is a plain file, write whole or not at
all, and say in one line of our own errors what the system would not do.

A path may be a pipe that nobody writes to, a device without an end, a link in a circle, or longer
than the system takes; every place that opens one for the user goes through here.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trivium.compiler.errors import BackendFailed, BadInput

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def require_file(path: Path, *, absent: str = "no such file", remedy: str = "") -> int:
    """Return the size in bytes of a plain file that can be read.

    Raises:
        BadInput: It is absent, a folder, a pipe, a device, or not readable; or no path at all.
    """
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BadInput(absent, about=str(path), remedy=remedy) from error
    except (OSError, ValueError, RuntimeError) as error:  # a NUL in it, links in a circle
        raise BadInput(f"cannot be read ({_reason(error)})", about=_shown(path)) from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
        raise BadInput(f"is {kind}, not a file", about=str(path), remedy=remedy)
    if not os.access(path, os.R_OK):
        raise BadInput("cannot be read (permission denied)", about=str(path))
    return status.st_size


def is_folder(path: Path) -> bool:
    """Whether a path is a folder; False also for what the system takes for no path."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def inside(folder: Path, name: str) -> Path | None:
    """Return where ``name`` lies below a folder, links followed; None if it does not."""
    try:
        base = folder.resolve()
        found = (base / name).resolve()
    except (OSError, ValueError, RuntimeError):
        return None
    return found if found.is_relative_to(base) and not Path(name).is_absolute() else None


def read_json(path: Path, *, what: str = "its JSON", remedy: str = "") -> Any:
    """Read a JSON file.

    Args:
        what: What to call it in the error: ``its manifest``.

    Raises:
        BadInput: It is no plain file, not readable, or not JSON.
    """
    require_file(path, remedy=remedy)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(
            f"{what} is damaged ({type(error).__name__})", about=str(path), remedy=remedy
        ) from error


def copy_tree(source: Path, destination: Path) -> None:
    """Copy the files below a folder into an existing one; the first failure ends it.

    `shutil.copytree` would go on, and then raise a list that says of none of them what it was.
    """
    import shutil

    for file in sorted(source.rglob("*")):
        place = destination / file.relative_to(source)
        if file.is_dir():
            place.mkdir(exist_ok=True)
        else:
            shutil.copyfile(file, place)


@contextmanager
def disk_full(path: Path) -> Iterator[None]:
    """Turn a full disk (or quota) while ``path`` is made into ``BackendFailed``."""
    try:
        yield
    except OSError as error:
        # numpy reports a short write in words of its own, without a number.
        short = error.errno is None and " requested and " in str(error)
        if error.errno not in _FULL and not short:
            raise
        raise BackendFailed(
            "the disk is full",
            about=_shown(path.parent),
            remedy="free some space; nothing was left",
        ) from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system refuses while ``path`` is written into an error of ours.

    Raises:
        BackendFailed: The disk is full.
        BadInput: Anything else: no permission, a folder in the way, a name that is too long.
    """
    if "\0" in str(path):
        raise BadInput("a NUL is in its name", about=_shown(path))
    try:
        with disk_full(path):
            yield
    except OSError as error:
        raise BadInput(f"cannot be written ({_reason(error)})", about=_shown(path)) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a hidden folder beside ``path``; the files left in it move there when all went well.

    The file that is called as ``path`` itself is moved last. An older file stays until then.

    Raises:
        BadInput, BackendFailed: As `writing`.
    """
    with writing(path):
        if path.is_dir():
            raise BadInput("is a folder", about=str(path), remedy="name a file")
        with workspace(path.parent) as folder:
            yield folder
            for file in sorted(folder.iterdir(), key=lambda file: file.name == path.name):
                os.replace(file, path.with_name(file.name))


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all; errors as `replacing`."""
    with replacing(path) as folder:
        (folder / path.name).write_text(text, encoding="utf-8")


_WORKSPACE = ".trivium-"
_ABANDONED_S = 60.0
"""Seconds that a workspace has to be left alone for before its lock is even tried."""

_workspaces: set[Path] = set()


@contextmanager
def workspace(parent: Path) -> Iterator[Path]:
    """Yield a hidden folder of this process's own below ``parent``; whatever is still there when
    the block ends is removed.

    A process that is killed outright leaves its workspace behind. It holds a lock on it while it
    lives, so the next one that works below the same parent knows which ones to remove.
    """
    import shutil
    import tempfile

    remove_abandoned(parent)
    # A short name, however long that of the thing in the making is.
    folder = Path(tempfile.mkdtemp(prefix=_WORKSPACE, dir=parent))
    _workspaces.add(folder)
    lock = _lock(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _workspaces.discard(folder)
        if lock is not None:
            os.close(lock)


def remove_workspaces() -> None:
    """Remove all workspaces of this process, before it is ended hard."""
    import shutil

    for folder in list(_workspaces):
        shutil.rmtree(folder, ignore_errors=True)


def remove_abandoned(parent: Path) -> None:
    """Remove the workspaces below ``parent`` whose process is gone."""
    import shutil

    for folder in parent.glob(f"{_WORKSPACE}*"):
        try:
            if time.time() - folder.stat().st_mtime < _ABANDONED_S:
                continue
        except OSError:
            continue
        lock = _lock(folder)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """Lock a folder for as long as the descriptor is open; None if another process has."""
    if sys.platform == "win32":
        return None
    import fcntl

    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _shown(path: Path) -> str:
    """A path for an error: the middle of a very long one left out."""
    text = str(path).replace("\0", "\\0")
    return text if len(text) <= 200 else f"{text[:120]}...{text[-60:]}"
