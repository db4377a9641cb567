"""The package list of pyproject.toml against the tree, and where the tests found the package."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("backends", "compiler", "models", "passes", "targets")


@pytest.fixture(scope="module")
def setuptools_table() -> dict[str, object]:
    document = tomllib.loads((ROOT / "pyproject.toml").read_text())
    table: dict[str, object] = document["tool"]["setuptools"]
    return table


def tree() -> set[str]:
    """Every package below the folders at the top, by its installed name."""
    found = {"trivium"}
    for folder in FOLDERS:
        for init in (ROOT / folder).rglob("__init__.py"):
            found.add("trivium." + ".".join(init.parent.relative_to(ROOT).parts))
    return found


def test_every_package_of_the_tree_is_listed(setuptools_table: dict[str, object]) -> None:
    assert set(setuptools_table["packages"]) == tree()  # type: ignore[call-overload]


def test_every_listed_package_maps_to_its_folder(setuptools_table: dict[str, object]) -> None:
    folders = setuptools_table["package-dir"]
    assert isinstance(folders, dict)
    expected = {
        name: "src/trivium"
        if name == "trivium"
        else name.removeprefix("trivium.").replace(".", "/")
        for name in tree()
    }
    assert folders == expected


def test_nothing_but_packages_holds_modules() -> None:
    # Scripts that go into artifacts as they are, installed as data.
    data = {Path("backends/tensorrt/scripts")}
    strays = [
        path.relative_to(ROOT)
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        if not (path.parent / "__init__.py").is_file() and path.parent.relative_to(ROOT) not in data
    ]
    assert strays == []


def test_links_lead_to_the_folders() -> None:
    for folder in FOLDERS:
        link = ROOT / "src" / "trivium" / folder
        assert link.is_symlink()
        assert link.readlink() == Path("../..") / folder


def test_the_wheel_is_what_is_tested() -> None:
    expected = os.environ.get("TRIVIUM_EXPECT_SITE")
    if expected is None:
        pytest.skip("not a run against the wheel (TRIVIUM_EXPECT_SITE is not set)")
    import trivium
    import trivium.compiler.build
    import trivium.passes

    for module in (trivium, trivium.compiler.build, trivium.passes):
        assert Path(str(module.__file__)).is_relative_to((ROOT / expected).resolve())


def test_data_files_are_installed() -> None:
    from importlib.resources import files

    from trivium.compiler import plugins, recipe

    assert (files("trivium") / "py.typed").is_file()
    for name in plugins.names("trivium.recipes"):
        assert recipe.read(name).name == name


def test_every_registered_name_can_be_imported() -> None:
    from trivium.compiler import plugins

    for group in plugins.GROUPS:
        for name in plugins.names(group):
            assert plugins.get(group, name) is not None


def test_every_pass_carries_its_registered_name() -> None:
    from trivium.compiler import plugins

    for name in plugins.names("trivium.passes"):
        cls = plugins.get("trivium.passes", name)
        assert cls.name == name
        assert cls.preserves in ("exact", "numeric", "lossy")
        assert cls.__doc__
