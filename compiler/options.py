"""The options of backends: what ``--option NAME=VALUE`` may say, and what it means.

A backend lists its own in an attribute ``options``. They are read before the model is, so that a
slip costs no minutes, and once more by the backend, for their values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from trivium.compiler.errors import BadInput

if TYPE_CHECKING:
    from trivium.compiler.backend import Backend


class Kind(Protocol):
    """What values an option takes."""

    @property
    def wanted(self) -> str:
        """Those values, in words that follow "give"."""
        ...

    def read(self, text: str) -> Any:
        """Return the value that a text stands for; raise ``ValueError`` if it stands for none."""
        ...


@dataclass(frozen=True)
class Option:
    """One option of a backend.

    Attributes:
        name: Of the option; one that ends with a full stop stands for all that begin so.
        default: The value where nothing is given.
    """

    name: str
    kind: Kind
    help: str
    default: Any = None

    @property
    def is_family(self) -> bool:
        return self.name.endswith(".")

    @property
    def shown(self) -> str:
        """The name as a reader is told it."""
        return f"{self.name}NAME" if self.is_family else self.name


def options_of(backend: Backend) -> Sequence[Option]:
    """The options that a backend has."""
    found: Sequence[Option] = getattr(backend, "options", ())
    return found


def values_of(backend: Backend, given: Mapping[str, str]) -> dict[str, Any]:
    """Return the values of a backend's options: those given, and the defaults of the others.

    Raises:
        BadInput: An option that the backend does not have, or a value that it cannot have.
    """
    known = options_of(backend)
    values = {option.name: option.default for option in known if not option.is_family}
    for name, text in given.items():
        option = _find(known, name)
        if option is None:
            raise BadInput(
                f"the backend {backend.name} has no option {name!r}",
                about="--option",
                remedy=f"it has {', '.join(option.shown for option in known) or 'none'}",
            )
        try:
            values[name] = option.kind.read(text)
        except ValueError:
            raise BadInput(
                f"{text!r} is not what it takes",
                about=f"--option {name}",
                remedy=f"give {option.kind.wanted}",
            ) from None
    return values


@dataclass(frozen=True)
class OneOf:
    """One of some words."""

    words: Sequence[str]

    @property
    def wanted(self) -> str:
        return f"{', '.join(self.words[:-1])} or {self.words[-1]}"

    def read(self, text: str) -> str:
        if text not in self.words:
            raise ValueError(text)
        return text


@dataclass(frozen=True)
class Truth:
    """Yes or no."""

    wanted: str = "true or false"

    def read(self, text: str) -> bool:
        return OneOf(("true", "false")).read(text.lower()) == "true"


@dataclass(frozen=True)
class Whole:
    """A whole number of a range, both ends in it."""

    low: int
    high: int

    @property
    def wanted(self) -> str:
        return f"a whole number from {self.low:,} to {self.high:,}"

    def read(self, text: str) -> int:
        if not text.isdecimal() or not self.low <= int(text) <= self.high:
            raise ValueError(text)
        return int(text)


@dataclass(frozen=True)
class Amount:
    """A number above nought, in a unit."""

    unit: str

    @property
    def wanted(self) -> str:
        return f"{self.unit}, above 0"

    def read(self, text: str) -> float:
        amount = float(text)
        if not 0 < amount < float("inf"):
            raise ValueError(text)
        return amount


def _find(known: Sequence[Option], name: str) -> Option | None:
    for option in known:
        if name == option.name or (option.is_family and name.startswith(option.name)):
            return option
    return None
