"""The recipes that ship with Trivium: each is a TOML file in ``recipes/``."""

from __future__ import annotations

from importlib.resources import files

from trivium.compiler import recipe


def __getattr__(name: str) -> recipe.Recipe:
    """Read ``recipes/<name>.toml`` on first use (names as in the entry points, ``-`` and all)."""
    file = files("trivium.passes") / "recipes" / f"{name}.toml"
    if name.startswith("_") or not file.is_file():
        raise AttributeError(name)
    return recipe.parse(file.read_text(encoding="utf-8"), about=f"recipe {name}")


RECIPES: dict[str, str] = {
    file.name.removesuffix(".toml"): f"trivium.passes.pipelines:{file.name.removesuffix('.toml')}"
    for file in sorted((files("trivium.passes") / "recipes").iterdir(), key=lambda f: f.name)
    if file.name.endswith(".toml")
}
