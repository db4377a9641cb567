"""Artifacts of earlier compiles, by the hash of everything that went into them.

A hit is checked file by file before it is used, so a stale or damaged entry costs a recompile,
never a wrong artifact. The folder is ``$TRIVIUM_CACHE`` or ``~/.cache/trivium``; the oldest
entries go when it exceeds ``$TRIVIUM_CACHE_BYTES`` (10 GiB).
"""

from __future__ import annotations

import hashlib
import os
from functools import cache
from pathlib import Path

from trivium.compiler import files
from trivium.compiler.artifact import Artifact, is_artifact, move_into_place, staged
from trivium.compiler.errors import BadInput


def folder() -> Path:
    """Where artifacts are kept."""
    home = os.environ.get("TRIVIUM_CACHE")
    if home:
        return Path(home)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "trivium"


def limit() -> int:
    """Bytes that the cache may hold."""
    text = os.environ.get("TRIVIUM_CACHE_BYTES", str(10 << 30))
    if not text.isdecimal():
        raise BadInput(
            f"{text!r} is no number of bytes", about="TRIVIUM_CACHE_BYTES", remedy="set or unset it"
        )
    return int(text)


@cache
def fingerprint() -> str:
    """Version of Trivium's own code: a changed pass must not find the artifacts of the old one."""
    package = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    roots = {package, *(p.resolve() for p in package.parent.glob("*/") if p.name in _PARTS)}
    for root in sorted(roots):
        for file in sorted(root.rglob("*.py")) + sorted(root.rglob("*.toml")):
            stat = file.stat()
            digest.update(f"{file.name}/{stat.st_size}/{stat.st_mtime_ns};".encode())
    return digest.hexdigest()


_PARTS = ("backends", "compiler", "models", "passes", "targets")


def fetch(key: str, out: Path) -> Artifact | None:
    """Return the artifact of an equal compile, copied to ``out``, or None.

    An artifact that already stands at ``out`` is left as it is.
    """
    standing = _sound(out, key)
    if standing is not None:
        return standing
    kept = _sound(folder() / key, key)
    if kept is None:
        return None
    with staged(out) as stage:
        files.copy_tree(kept.path, stage)
    os.utime(kept.path)
    return Artifact.open(out, checked=False)


def _sound(path: Path, key: str) -> Artifact | None:
    try:
        artifact = Artifact.open(path)
    except BadInput:
        return None
    return artifact if artifact.manifest.get("key") == key else None


def store(key: str, artifact: Artifact) -> None:
    """Keep a copy; a cache that cannot be written is no error."""
    home = folder()
    size = _size(artifact.path)
    if size > limit() // 2:
        return
    try:
        home.mkdir(parents=True, exist_ok=True)
        with files.workspace(home) as stage:
            files.copy_tree(artifact.path, stage)
            move_into_place(stage, home / key)
        _evict(home)
    except (OSError, BadInput):
        return


def entries() -> list[tuple[Path, int]]:
    """Return the kept artifacts, oldest use first, each with its bytes."""
    home = folder()
    if not files.is_folder(home):
        return []
    try:
        found = [path for path in home.iterdir() if is_artifact(path)]
        used = {path: path.stat().st_mtime for path in found}
        return [(path, _size(path)) for path in sorted(found, key=used.__getitem__)]
    except OSError as error:
        raise BadInput(
            f"cannot be read ({error.strerror})", about=str(home), remedy="set TRIVIUM_CACHE"
        ) from error


def clear() -> int:
    """Remove everything; return the bytes freed."""
    import shutil

    freed = 0
    for path, size in entries():
        shutil.rmtree(path, ignore_errors=True)
        freed += size
    files.remove_abandoned(folder())
    return freed


def _evict(home: Path) -> None:
    import shutil

    kept = entries()
    total = sum(size for _, size in kept)
    for path, size in kept:
        if total <= limit():
            return
        shutil.rmtree(path, ignore_errors=True)
        total -= size


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
