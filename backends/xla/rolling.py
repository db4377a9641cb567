"""Whether layers that are the same run as one scan: decided by what both ways take to compile.

A scan is compiled once for all its turns, but keeps the compiler from fusing and prefetching
across layers, and costs temporary memory. So it has to pay: where the program as it is compiles
within the threshold (`SOON`, or what is asked for) nothing else is tried; where it does not, and
has layers that are the same, both are compiled and the scan is taken if it compiles in less than
`SHORTER` of the time and needs no more than `LARGER` of the memory. The gain is every later load,
which compiles the export again. On a TPU there is none (docs/scan.md), so nothing is tried there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from trivium.backends.xla.compiling import memory_of
from trivium.compiler.errors import Unsupported

if TYPE_CHECKING:
    from trivium.backends.xla.programs import Attempt

SOON, SHORTER, LARGER = 20.0, 0.6, 1.1
CHOICES = ("auto", "always", "never")


class Attempts(Protocol):
    """Exports and compiles a program one way."""

    def __call__(self, *, roll: bool) -> Attempt: ...


def choose(
    attempt: Attempts, job: Mapping[str, Any], alike: Callable[[], bool]
) -> tuple[Attempt, dict[str, Any]]:
    """Return the program to keep, and for the manifest why and what was measured.

    Args:
        alike: Whether the program has layers that are the same.
    """
    wish: str = job["scan"]
    why = "as asked" if wish == "never" else _hindrance(job, wish)
    if why:
        return attempt(roll=False), {"scan": False, "why": why}
    if wish == "always":
        if not alike():
            raise Unsupported(
                "it has no layers that are the same but for their weights",
                about="scan=always",
                remedy="leave the option out",
            )
        rolled = attempt(roll=True)
        return rolled, {"scan": True, "why": "as asked", "rolled": _measures(rolled)}
    plain = attempt(roll=False)
    took = plain.trace_seconds + plain.compile_seconds
    measured = {"unrolled": _measures(plain)}
    soon: float = job["scan_after"]
    if took < soon:
        return plain, {"scan": False, "why": f"it compiles within {soon:g} s", **measured}
    if not alike():
        return plain, {"scan": False, "why": "no layers are the same", **measured}
    rolled = attempt(roll=True)
    measured["rolled"] = _measures(rolled)
    quicker = rolled.trace_seconds + rolled.compile_seconds <= SHORTER * took
    small = _bytes(rolled) <= LARGER * _bytes(plain)
    if quicker and small:
        return rolled, {"scan": True, "why": "it compiles sooner", **measured}
    why = "a scan takes more memory" if quicker else "a scan compiles no sooner"
    return plain, {"scan": False, "why": why, **measured}


def _hindrance(job: Mapping[str, Any], wish: str) -> str:
    """Why no scan is to be tried, whatever it would take; empty if it may be."""
    # Programs share one copy of the weights, stacked or not; to stack the caches of layers would
    # be to copy them in every call.
    if job["caches"]:
        return "not tried: its layers have caches"
    if len(job["programs"]) > 1:
        return "not tried: several programs share the weights"
    if wish == "auto" and job["device"]["platform"] == "tpu":
        return "not tried: libtpu compiles layers that are the same once, with or without a scan"
    return ""


def _bytes(one: Attempt) -> int:
    return sum(memory_of(one.compiled).values())


def _measures(one: Attempt) -> dict[str, float]:
    return {
        "trace_seconds": round(one.trace_seconds, 3),
        "compile_seconds": round(one.compile_seconds, 3),
        "temporaries": memory_of(one.compiled)["temporaries"],
        "bytes": _bytes(one),
    }
