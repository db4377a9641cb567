"""How a program is spread over the chips of a slice.

Without annotations there are two ways: every chip computes its share of the batch, or, where the
batch does not divide, every chip computes the same. The weights are whole on each chip. The
partition is decided once, at build time, and the manifest holds it, so that a program that is
loaded onto a real slice is spread as it was compiled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from trivium.compiler.errors import BadInput
from trivium.compiler.types import TensorInfo

Kind = Literal["single", "batch", "replicated"]

AXIS = "batch"
"""Name of the one axis of the mesh."""


@dataclass(frozen=True)
class Partition:
    """Which axis of which tensor is spread over the devices.

    Attributes:
        kind: ``single`` device, ``batch`` (data parallel) or ``replicated``.
        devices: Length of the mesh.
        inputs, outputs: Tensor name -> the axis that is spread; a tensor that is absent is whole
            on every device.
        note: What was decided and why, in words.
    """

    kind: Kind
    devices: int
    inputs: Mapping[str, int] = field(default_factory=dict)
    outputs: Mapping[str, int] = field(default_factory=dict)
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, table: Mapping[str, Any]) -> Partition:
        return cls(**table)


def choose(
    inputs: Sequence[TensorInfo],
    outputs: Sequence[TensorInfo],
    devices: int,
    wish: str | None = None,
) -> Partition:
    """Return the partition of a program with static shapes.

    The batch is the first axis of the first input that has one; every other input and output
    whose first axis is as long is taken to run along it.

    Args:
        wish: ``batch`` or ``replicated``, when the user asked for one of them.

    Raises:
        BadInput: An unknown wish, or a batch that was asked for and does not divide.
    """
    if wish not in (None, "batch", "replicated"):
        raise BadInput(
            f"no partition is called {wish!r}", about="partition", remedy="batch or replicated"
        )
    if devices == 1:
        return Partition("single", 1)
    batch = next((info.shape[0] for info in inputs if info.shape), None)
    divides = isinstance(batch, int) and batch > 0 and batch % devices == 0
    if wish == "replicated" or (wish is None and not divides):
        reason = "as asked" if wish else f"a batch of {batch} does not divide by {devices}"
        note = f"all {devices} devices compute the same ({reason})"
        return Partition("replicated", devices, note=note)
    if not divides:
        raise BadInput(
            f"a batch of {batch} does not divide over {devices} devices",
            about="partition=batch",
            remedy=f"bind the first dimension to a multiple of {devices} with --shape",
        )
    return Partition(
        "batch",
        devices,
        _along(inputs, batch),
        _along(outputs, batch),
        f"data parallel: each of {devices} devices computes {batch // devices} "  # type: ignore[operator]
        f"of the batch of {batch}",
    )


def _along(infos: Sequence[TensorInfo], batch: int | str | None) -> dict[str, int]:
    return {info.name: 0 for info in infos if info.shape and info.shape[0] == batch}


def shardings(partition: Partition, mesh: Any, infos: Sequence[TensorInfo], side: str) -> Any:
    """Return jax's sharding of each tensor of one side (``inputs`` or ``outputs``), by name."""
    spread: Mapping[str, int] = getattr(partition, side)
    return {
        info.name: _sharding(mesh, *[None] * spread[info.name], AXIS)
        if info.name in spread
        else whole(mesh)
        for info in infos
    }


def whole(mesh: Any) -> Any:
    """Return the sharding of what every device holds whole."""
    return _sharding(mesh)


def _sharding(mesh: Any, *axes: str | None) -> Any:
    from jax import sharding

    spec: Any = sharding.PartitionSpec
    return sharding.NamedSharding(mesh, spec(*axes))
