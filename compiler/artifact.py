"""The folder that a compile leaves behind: manifest, checksums, and a safe way in and out.

An artifact is written under a temporary name beside its final place and moved there whole, so a
half-written one is never seen. It is read without pickle, and only after every file's SHA-256
agrees with the manifest (`checksums` says when a large file need not be read for that).
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trivium.compiler import checksums, files, plugins
from trivium.compiler import manifest as manifests
from trivium.compiler.errors import BackendFailed, BadInput
from trivium.compiler.generator import Generator
from trivium.compiler.types import Program, TensorInfo

if TYPE_CHECKING:
    from trivium.compiler.backend import Backend, Executable

SCHEMA = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Artifact:
    """A compiled model on disk.

    Attributes:
        path: The folder.
        manifest: What it says of itself; see ``docs/architecture.md`` for the keys.
    """

    path: Path
    manifest: Mapping[str, Any]

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], *, checked: bool = True, afresh: bool = False
    ) -> Artifact:
        """Open an artifact.

        Args:
            path: The folder.
            checked: Whether to compare every file with its checksum first.
            afresh: Whether to read also the large files that have not changed since they were
                last found right.

        Raises:
            BadInput: Not an artifact, written by a newer Trivium, or damaged.
        """
        path = Path(path)
        if not is_artifact(path):
            raise BadInput(
                "not an artifact (it has no manifest.json)",
                about=str(path),
                remedy="make one with: trivium compile MODEL --target NAME -o OUT",
            )
        again = "compile it again"
        document = files.read_json(path / MANIFEST, what="its manifest", remedy=again)
        schema = document.get("schema") if isinstance(document, dict) else None
        if schema is not None and schema != SCHEMA:
            raise BadInput(
                f"its schema is {schema}, this Trivium reads {SCHEMA}",
                about=str(path),
                remedy=again,
            )
        wrong = manifests.problem(document)
        if schema is None or wrong is not None:
            raise BadInput(
                f"its manifest is damaged: {wrong or 'it has no schema'}",
                about=str(path),
                remedy=again,
            )
        if checked:
            _check_files(path, document["files"], afresh)
        return cls(path, document)

    @property
    def backend(self) -> Backend:
        backend: Backend = plugins.loading(self.manifest["backend"])
        return backend

    @property
    def inputs(self) -> tuple[TensorInfo, ...]:
        """The signature; a dimension that takes several sizes is its name, as in the model."""
        return tuple(_tensor_info(table) for table in self.manifest["inputs"])

    @property
    def programs(self) -> tuple[Program, ...]:
        return tuple(
            Program(
                one["name"],
                one["file"],
                tuple(_tensor_info(t) for t in one["inputs"]),
                tuple(_tensor_info(t) for t in one["outputs"]),
            )
            for one in self.manifest["programs"]
        )

    @property
    def generator(self) -> Generator | None:
        """How to drive it token by token; None if it is no generator."""
        table = self.manifest["generator"]
        return Generator.from_json(table) if table is not None else None

    def load(self) -> Executable:
        """Load it onto its target, or the nearest stand-in here; see ``Backend.load``."""
        return self._loaded("load")

    def load_to_verify(self) -> Executable:
        """The same, in the way in which the backend can show the most of the target.

        A backend may have ``load_to_verify`` beside ``load`` where that costs more than a user
        who only wants the outputs should pay, such as simulating several devices.
        """
        return self._loaded("load_to_verify")

    def _loaded(self, how: str) -> Executable:
        try:
            if self.manifest["parts"]:
                from trivium.compiler import parts

                return parts.load(self, how)
            load: Callable[[Artifact], Executable]
            load = getattr(self.backend, how, self.backend.load)
            return load(self)
        except (LookupError, TypeError, ValueError, FileNotFoundError) as error:
            # What a backend wrote of its own (``details``, side files) is for it alone to read.
            raise BadInput(
                f"{self.backend.name} cannot make sense of it ({type(error).__name__}: {error})",
                about=str(self.path),
                remedy="compile it again",
            ) from error


def is_artifact(path: Path) -> bool:
    """Whether a folder claims to be an artifact."""
    try:
        return (path / MANIFEST).is_file()
    except (OSError, ValueError):
        return False


def _tensor_info(table: Mapping[str, Any]) -> TensorInfo:
    return TensorInfo(table["name"], table["dtype"], tuple(table["shape"]))


def _check_files(path: Path, expected: Mapping[str, str], afresh: bool) -> None:
    for name, checksum in expected.items():
        file = files.inside(path, name)
        missing = f"the file {name} is missing"
        if file is None:
            raise BadInput(missing, about=str(path), remedy="compile it again")
        files.require_file(file, absent=missing, remedy="compile it again")
        if not checksums.matches(file, checksum, afresh=afresh):
            raise BadInput(
                f"the file {name} does not match its checksum",
                about=str(path),
                remedy="it was changed or damaged after the compile; compile it again",
            )


def hash_files(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below a folder except the manifest, by relative path."""
    return {
        file.relative_to(folder).as_posix(): checksums.file_hash(file)
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file != folder / MANIFEST
    }


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest of a folder, checksums of its files included."""
    document = {"schema": SCHEMA, **manifest, "files": hash_files(folder)}
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``out`` when the block ends well.

    An older artifact at ``out`` stays until that moment and is replaced whole; anything there that
    is not an artifact is never touched.

    Raises:
        BadInput: ``out`` exists and is no artifact, or its parent cannot be written.
        BackendFailed: The disk is full.
    """
    with files.writing(out):
        if out.exists() and not is_artifact(out):
            empty = out.is_dir() and not any(out.iterdir())
            if not empty:
                raise BadInput(
                    "exists and is not an artifact", about=str(out), remedy="give another -o OUT"
                )
        out.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        with files.writing(out):
            folder = stack.enter_context(files.workspace(out.parent))
        with files.disk_full(out):
            yield folder
        with files.writing(out):
            move_into_place(folder, out)


def move_into_place(folder: Path, out: Path) -> None:
    """Rename ``folder`` to ``out``, replacing an older folder of that name as a whole."""
    folder.chmod(0o755)
    for _ in range(100):
        try:
            folder.rename(out)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        # Another compile may have finished meanwhile: the last one wins, none is torn.
        with files.workspace(out.parent) as old, suppress(FileNotFoundError):
            os.rename(out, old)
    raise BackendFailed("other processes keep writing there", about=str(out))
