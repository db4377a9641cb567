"""The recipes that ship with Trivium: each is a TOML file in ``recipes/``.

A recipe is called what its file says; file names have to do without ``:`` (``prune-2-4.toml``
holds ``prune-2:4``).
"""

from __future__ import annotations

import tomllib
from importlib.resources import files

from trivium.compiler import recipe

_FOLDER = files("trivium.passes") / "recipes"


def __getattr__(stem: str) -> recipe.Recipe:
    """Read ``recipes/<stem>.toml`` on first use (file names as attributes, ``-`` and all)."""
    file = _FOLDER / f"{stem}.toml"
    if stem.startswith("_") or not file.is_file():
        raise AttributeError(stem)
    return recipe.parse(file.read_text(encoding="utf-8"), about=f"recipe {stem}")


def _table() -> dict[str, str]:
    table = {}
    for file in sorted(_FOLDER.iterdir(), key=lambda file: file.name):
        stem, _, kind = file.name.rpartition(".")
        if kind == "toml":
            name = tomllib.loads(file.read_text(encoding="utf-8"))["name"]
            table[name] = f"trivium.passes.pipelines:{stem}"
    return table


RECIPES: dict[str, str] = _table()
