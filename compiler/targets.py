"""Finding a target by its name on the command line (``nvidia-t4``, ``tpu-v5e:2x2``, ``cpu``).

The devices themselves live outside of the compiler, behind the entry points ``trivium.targets``:
each name stands for a function that takes the slice (the text after the colon, or None) and
returns a `Target`.
"""

from __future__ import annotations

from collections.abc import Callable

from trivium.compiler import plugins
from trivium.compiler.types import Target


def find(name: str) -> Target:
    """Return the target of a name.

    Raises:
        BadInput: No such target, or no such slice of it.
    """
    device, _, topology = name.partition(":")
    make: Callable[[str | None], Target] = plugins.get("trivium.targets", device)
    return make(topology or None)


def expand(name: str, max_chips: int | None = None) -> list[str]:
    """The targets of a name that may end in ``:*``, which stands for every slice of a device.

    Args:
        max_chips: Leave out larger slices; with it a device without a slice stands for all of its.
    """
    device, _, topology = name.partition(":")
    slices: tuple[str, ...] = getattr(plugins.get("trivium.targets", device), "slices", ())
    if topology == "*" or (not topology and max_chips is not None):
        found = [f"{device}:{shape}" for shape in slices] or [device]
        return [one for one in found if max_chips is None or find(one).chips <= max_chips]
    return [name]


def names() -> list[str]:
    """Return the names of all installed targets, without slices."""
    return plugins.names("trivium.targets")
