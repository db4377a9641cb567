"""Reading a device's TOML file into a `Target`.

A file holds figures and, under ``[sources]``, where each was found; a figure that was not found
anywhere is absent. What is doubtful stands in ``notes`` and reaches the reader of every prediction.
``[slices]`` lists the shapes in which a TPU is rented; rates and capacities are those of one chip.
Prices, which age, are in ``prices.toml``.
"""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass, fields
from functools import cache
from importlib.resources import files
from typing import Any

from trivium.compiler.errors import BadInput
from trivium.compiler.prices import Table, parse, priced
from trivium.compiler.types import Target

_DEVICES = files("trivium.targets") / "devices"

NOT_FIGURES = frozenset({"title", "family", "backends", "notes", "options", "sources"})
"""Keys of a device file that need no source."""


@cache
def read(name: str) -> dict[str, Any]:
    """Return the content of a device's file.

    Raises:
        BadInput: A key that no target has, or a figure without a source.
    """
    document = tomllib.loads((_DEVICES / f"{name}.toml").read_text(encoding="utf-8"))
    known = {field.name for field in fields(Target)} | {"slices"}
    unknown = set(document) - known
    if unknown:
        raise BadInput(f"unknown keys: {', '.join(sorted(unknown))}", about=f"target {name}")
    unsourced = set(document) - NOT_FIGURES - set(document["sources"])
    if unsourced:
        raise BadInput(
            f"figures without a source: {', '.join(sorted(unsourced))}",
            about=f"target {name}",
            remedy="say under [sources] where each was found, or leave it out",
        )
    return document


def load(name: str, topology: str | None = None) -> Target:
    """Return the target of a device and, for a TPU, a slice of it such as ``2x2``.

    Raises:
        BadInput: The device has no such slice; the message lists those that it has.
    """
    document = dict(read(name))
    slices = document.pop("slices", None)
    if slices is None:
        if topology is not None:
            raise BadInput(
                f"{name} has no slices", about=f"{name}:{topology}", remedy=f"write {name}"
            )
        return _target(name, document)
    shape = topology or slices["default"]
    if shape not in slices["shapes"]:
        raise BadInput(
            f"no slice {shape!r}",
            about=f"{name}:{shape}",
            remedy=f"it comes as {', '.join(slices['shapes'])}",
        )
    chips = math.prod(int(size) for size in shape.split("x"))
    options = dict(document.get("options", {}))
    if "generation" in options:
        options["topology"] = f"{options['generation']}:{shape}"
    full = f"{name}:{topology}" if topology else name
    return _target(full, {**document, "options": options}, chips=chips, topology=shape)


def _target(name: str, document: dict[str, Any], **more: Any) -> Target:
    listed = {"backends": tuple(document["backends"]), "notes": tuple(document.get("notes", ()))}
    return priced(Target(name=name, **{**document, **listed, **more}), _prices())


@cache
def _prices() -> Table:
    text = (files("trivium.targets") / "prices.toml").read_text(encoding="utf-8")
    return parse(text, about="prices.toml")


@dataclass(frozen=True)
class Device:
    """The maker of a device's targets.

    Attributes:
        slices: The shapes that it is rented in, smallest first; none if it is not.
    """

    name: str
    slices: tuple[str, ...]

    def __call__(self, topology: str | None = None) -> Target:
        return load(self.name, topology)


def __getattr__(name: str) -> Device:
    """The maker of a device's target (names as in ``TARGETS``, ``-`` and all)."""
    if name.startswith("_") or not (_DEVICES / f"{name}.toml").is_file():
        raise AttributeError(name)
    return Device(name, tuple(read(name).get("slices", {}).get("shapes", ())))
