"""The machine this runs on, as a target: what can be read off it, and nothing more."""

from __future__ import annotations

import os

from trivium.compiler.errors import BadInput
from trivium.compiler.types import Target


def host(topology: str | None) -> Target:
    """Return the target ``cpu``."""
    if topology is not None:
        raise BadInput("the host CPU has no slices", about=f"cpu:{topology}")
    return Target(
        name="cpu",
        family="cpu",
        backends=("onnxruntime",),
        title="this machine's CPU",
        units=os.cpu_count(),
    )
