"""Whether layers that are the same run as one scan: decided by what both ways take to compile.

A scan is compiled once for all its turns, but keeps the compiler from fusing and prefetching
across layers, and costs temporary memory. So it has to pay: where the program as it is compiles
within `SOON` nothing else is tried; where it does not, both are compiled and the scan is taken if
it compiles in less than `SHORTER` of the time and needs no more than `LARGER` of the memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from trivium.compiler.errors import Unsupported

if TYPE_CHECKING:
    from trivium.backends.xla.worker import Attempt

SOON, SHORTER, LARGER = 20.0, 0.6, 1.1
CHOICES = ("auto", "always", "never")


class Attempts(Protocol):
    """Exports and compiles a program one way."""

    def __call__(self, *, roll: bool) -> Attempt: ...


def choose(attempt: Attempts, job: Mapping[str, Any]) -> tuple[Attempt, dict[str, Any]]:
    """Return the program to keep, and for the manifest why and what was measured."""
    wish: str = job["scan"]
    if wish == "never" or len(job["programs"]) > 1 or job["caches"]:
        # Programs share one copy of the weights, stacked or not; to stack the caches of layers
        # would be to copy them in every call.
        why = "its layers have caches" if job["caches"] else "several programs share the weights"
        why = "as asked" if wish == "never" else f"not tried: {why}"
        return attempt(roll=False), {"scan": False, "why": why}
    if wish == "always":
        rolled = attempt(roll=True)
        if not rolled.lowered.stacks:
            raise Unsupported(
                "it has no layers that are the same but for their weights",
                about="scan=always",
                remedy="leave the option out",
            )
        return rolled, {"scan": True, "why": "as asked", "rolled": _measures(rolled)}
    plain = attempt(roll=False)
    took = plain.trace_seconds + plain.compile_seconds
    measured = {"unrolled": _measures(plain)}
    if took < SOON:
        return plain, {"scan": False, "why": f"it compiles within {SOON:g} s", **measured}
    rolled = attempt(roll=True)
    if not rolled.lowered.stacks:
        return plain, {"scan": False, "why": "no layers are the same", **measured}
    measured["rolled"] = _measures(rolled)
    quicker = rolled.trace_seconds + rolled.compile_seconds <= SHORTER * took
    small = _bytes(rolled) <= LARGER * _bytes(plain)
    if quicker and small:
        return rolled, {"scan": True, "why": "it compiles sooner", **measured}
    why = "a scan takes more memory" if quicker else "a scan compiles no sooner"
    return plain, {"scan": False, "why": why, **measured}


def _bytes(one: Attempt) -> int:
    from trivium.backends.xla.worker import memory_of

    return sum(memory_of(one.compiled).values())


def _measures(one: Attempt) -> dict[str, float]:
    from trivium.backends.xla.worker import memory_of

    return {
        "trace_seconds": round(one.trace_seconds, 3),
        "compile_seconds": round(one.compile_seconds, 3),
        "temporaries": memory_of(one.compiled)["temporaries"],
        "bytes": _bytes(one),
    }
