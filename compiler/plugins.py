"""Finding backends, passes, targets, recipes and model builders through entry points.

A built-in and a plugin take the same road. An entry point may name one object, or a *table*
(a mapping of names to ``"module:attribute"``), so that a folder lists all it has on one page and
nothing is imported before it is used. A duplicate name is an error. Only what loads an artifact
goes another way (`loading`): finding out what is installed takes a tenth of the time to the first
token of a small model.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from trivium.compiler.errors import BadInput

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUPS = (
    "trivium.backends",
    "trivium.passes",
    "trivium.targets",
    "trivium.recipes",
    "trivium.models",
    "trivium.metrics",
)
TABLE = "table"
"""The entry-point name that announces a table instead of one object."""

_BACKENDS = "trivium.backends"
_OWN = "BACKENDS"
"""Where the group of that name has the backends of this package."""


@cache
def _index(group: str) -> dict[str, str | EntryPoint]:
    from importlib.metadata import entry_points

    found: dict[str, str | EntryPoint] = {}

    def add(name: str, reference: str | EntryPoint) -> None:
        if name in found:
            raise BadInput(
                f"two plugins offer {name!r} in {group}",
                remedy="uninstall one of the packages that provide it",
            )
        found[name] = reference

    for point in entry_points(group=group):
        if point.name != TABLE:
            add(point.name, point)
            continue
        table: Mapping[str, str] = point.load()
        for name, reference in table.items():
            add(name, reference)
    return found


def names(group: str) -> list[str]:
    """Return the names that a group offers, in order of registration."""
    return list(_index(group))


@cache
def get(group: str, name: str) -> Any:
    """Import and return what a name stands for.

    Raises:
        BadInput: Nothing of that name is installed; the message lists what is.
    """
    index = _index(group)
    if name not in index:
        kind = group.rpartition(".")[2].rstrip("s")
        kind = {"passe": "pass"}.get(kind, kind)
        raise BadInput(
            f"no {kind} named {name!r}", remedy=f"known: {', '.join(sorted(index)) or 'none'}"
        )
    reference = index[name]
    return _resolved(reference) if isinstance(reference, str) else reference.load()


@cache
def loading(name: str) -> Any:
    """Return the backend of an artifact: our own if it is one of those, whatever else is installed.

    Raises:
        BadInput: As `get`.
    """
    own: Mapping[str, str] = getattr(importlib.import_module(_BACKENDS), _OWN)
    return _resolved(own[name]) if name in own else get(_BACKENDS, name)


def _resolved(reference: str) -> Any:
    module, _, attribute = reference.partition(":")
    return getattr(importlib.import_module(module), attribute)
