"""A device that the plugin brings along."""

from __future__ import annotations

from trivium.compiler.types import Target


def abacus(topology: str | None) -> Target:
    """Return the target ``abacus``, which nothing is known of."""
    return Target(name="abacus", family="cpu", backends=("evaluator",), title="an abacus")
