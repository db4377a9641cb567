"""What a killed run needs to go on: arrays in an ``.npz``, the rest in JSON, written whole or not
at all, and never pickled.

A checkpoint belongs to one tuning: the same model, data, recipe and settings. It is refused for
another, rather than mixed into it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trivium.backends.xla.lowering.lazy import jax, jnp
from trivium.compiler import files
from trivium.compiler.errors import BadInput

Array = np.ndarray[Any, np.dtype[Any]]

STATE, ARRAYS = "tuning.json", "tuning-{step}.npz"


@dataclass(frozen=True)
class Checkpoint:
    """A folder that holds the last state of a tuning.

    Attributes:
        fingerprint: Of all that the tuning depends on.
    """

    folder: Path
    fingerprint: str

    def save(self, trees: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Write a state; the one before stays until this one is whole.

        Args:
            trees: Pytrees of arrays.
            facts: Everything else, as JSON; with ``step``.
        """
        arrays = {}
        for name, tree in trees.items():
            leaves = jax.tree.leaves(tree)
            arrays.update({f"{name}/{i}": np.asarray(leaf) for i, leaf in enumerate(leaves)})
        self.folder.mkdir(parents=True, exist_ok=True)
        name = ARRAYS.format(step=facts["step"])
        with files.replacing(self.folder / name) as folder, (folder / name).open("wb") as stream:
            np.savez(stream, **arrays)  # type: ignore[arg-type]  # numpy's stub takes it for allow_pickle
        document = {"fingerprint": self.fingerprint, "arrays": name, **facts}
        with files.replacing(self.folder / STATE) as folder:
            (folder / STATE).write_text(json.dumps(document, indent=1), encoding="utf-8")
        for old in self.folder.glob(ARRAYS.format(step="*")):
            if old.name != name:
                old.unlink(missing_ok=True)

    def load(self, like: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Read the state back, or return None where there is none.

        Args:
            like: Trees of the same form.

        Raises:
            BadInput: It is of another tuning, or damaged.
        """
        path = self.folder / STATE
        if not path.exists():
            return None
        facts: dict[str, Any] = files.read_json(
            path, what="the checkpoint", remedy="remove the folder to start over"
        )
        if facts.get("fingerprint") != self.fingerprint:
            raise BadInput(
                "is the checkpoint of another model, data, recipe or settings",
                about=str(self.folder),
                remedy="remove it to start over, or name another folder with --checkpoint",
            )
        try:
            with np.load(self.folder / facts["arrays"], allow_pickle=False) as arrays:
                trees = {name: _filled(name, tree, arrays) for name, tree in like.items()}
        except Exception as error:  # zipfile, zlib and numpy each raise their own kinds
            raise BadInput(
                f"the checkpoint is damaged ({error})",
                about=str(self.folder),
                remedy="remove the folder to start over",
            ) from error
        return trees, facts

    def remove(self) -> None:
        """Delete the state; the folder goes too if nothing else is in it."""
        for file in (*self.folder.glob(ARRAYS.format(step="*")), self.folder / STATE):
            file.unlink(missing_ok=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()


def _filled(name: str, tree: Any, arrays: Any) -> Any:
    leaves, form = jax.tree.flatten(tree)
    read = []
    for index, leaf in enumerate(leaves):
        array = arrays[f"{name}/{index}"]
        if array.shape != np.shape(leaf):
            raise ValueError(f"{name}/{index} is {array.shape}, not {np.shape(leaf)}")
        read.append(jnp.asarray(array, np.asarray(leaf).dtype))
    return jax.tree.unflatten(form, read)
