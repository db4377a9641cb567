"""How a program is spread over the chips of a slice.

A model says so in its annotations (see `sharding`). Without them there are two ways, in both of
which the weights are whole on each chip: every chip computes its share of the batch, or, where
the batch does not divide, every chip computes the same. The partition is decided once, at build
time, and the manifest holds it, so that a program that is loaded onto a real slice is spread as
it was compiled.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Any, Literal

from trivium.backends.xla.sharding import Layout, Spec
from trivium.compiler.errors import BadInput
from trivium.compiler.types import TensorInfo

if TYPE_CHECKING:
    import onnx_ir as ir

Kind = Literal["single", "batch", "replicated", "annotated"]

SIMULATED = 8
"""How many devices are made of a CPU at most to run a partition without its own."""

AXIS = "batch"
"""Name of the one axis of the mesh of a model without annotations."""


@dataclass(frozen=True)
class Partition:
    """Which axes of which tensor are spread over the devices.

    Attributes:
        kind: ``single`` device, ``batch`` (data parallel), ``replicated``, or as ``annotated``.
        mesh: Length of each axis of the mesh by name, the one that moves slowest first.
        inputs, outputs, weights: Tensor name -> along which axes of the mesh each of its own is
            spread; a tensor that is absent is whole on every device.
        note: What was decided and why, in words.
    """

    kind: Kind
    mesh: Mapping[str, int]
    inputs: Mapping[str, Spec] = field(default_factory=dict)
    outputs: Mapping[str, Spec] = field(default_factory=dict)
    weights: Mapping[str, Spec] = field(default_factory=dict)
    note: str = ""

    @property
    def devices(self) -> int:
        """How many devices there are in the mesh."""
        return prod(self.mesh.values())

    def shards(self, weight: str) -> int:
        """Into how many parts a weight is split."""
        return prod(self.mesh[name] for names in self.weights.get(weight, []) for name in names)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, table: Mapping[str, Any]) -> Partition:
        return cls(**table)


SINGLE = Partition("single", {AXIS: 1})
"""Of a program on one device."""


def choose(
    inputs: Sequence[TensorInfo],
    outputs: Sequence[TensorInfo],
    devices: int,
    wish: str | None = None,
) -> Partition:
    """Return the partition of a program with static shapes and without annotations.

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
        return SINGLE
    mesh = {AXIS: devices}
    batch = next((info.shape[0] for info in inputs if info.shape), None)
    divides = isinstance(batch, int) and batch > 0 and batch % devices == 0
    if wish == "replicated" or (wish is None and not divides):
        reason = "as asked" if wish else f"a batch of {batch} does not divide by {devices}"
        note = f"all {devices} devices compute the same ({reason})"
        return Partition("replicated", mesh, note=note)
    if not divides:
        raise BadInput(
            f"a batch of {batch} does not divide over {devices} devices",
            about="partition=batch",
            remedy=f"bind the first dimension to a multiple of {devices} with --shape",
        )
    return Partition(
        "batch",
        mesh,
        _along(inputs, batch),
        _along(outputs, batch),
        note=f"data parallel: each of {devices} devices computes {batch // devices} "  # type: ignore[operator]
        f"of the batch of {batch}",
    )


def annotated(
    layout: Layout,
    graph: ir.Graph,
    weights: Mapping[str, ir.Value],
    stacks: Mapping[str, Sequence[str]] | None = None,
) -> Partition:
    """Return the partition that a model's annotations ask for.

    Args:
        weights: Where in the model each weight is; of a stack, its first.
        stacks: Those that are several in one, along a new first axis.
    """
    return Partition(
        "annotated",
        layout.mesh,
        layout.of(graph.inputs),
        layout.of(graph.outputs),
        {
            name: [*([[]] if name in (stacks or {}) else []), *layout.specs.get(value, [])]
            for name, value in weights.items()
        },
        f"spread over {prod(layout.mesh.values())} devices as the model says: {layout.name}",
    )


def noting_annotations(partition: Partition, model: ir.Model) -> Partition:
    """Say that a model's annotations are not what a partition was made from, if it has some."""
    names = ", ".join(one.name for one in model.device_configurations)
    if not names:
        return partition
    why = "one device computes all of it" if partition.devices == 1 else "as asked"
    note = f"the model's annotations for {names} are not used ({why})"
    return replace(partition, note=f"{partition.note}; {note}" if partition.note else note)


def reduced(partition: Partition, most: int = SIMULATED) -> Partition:
    """Return the partition over the largest mesh of at most so many devices that divides its own.

    What divides over an axis divides over a divisor of its length, so the specs stay as they are.
    As many axes as possible keep at least two devices, so that each split is still one.
    """
    if partition.devices <= most:
        return partition
    choices = ([d for d in range(1, n + 1) if n % d == 0] for n in partition.mesh.values())
    fitting = [sizes for sizes in product(*choices) if prod(sizes) <= most]
    best = max(fitting, key=lambda sizes: (sum(n > 1 for n in sizes), prod(sizes), sizes[::-1]))
    return replace(partition, mesh=dict(zip(partition.mesh, best, strict=True)))


def _along(infos: Sequence[TensorInfo], batch: int | str | None) -> dict[str, Spec]:
    return {info.name: [[AXIS]] for info in infos if info.shape and info.shape[0] == batch}


def shardings(mesh: Any, names: Iterable[str], specs: Mapping[str, Spec]) -> dict[str, Any]:
    """Return jax's sharding of each named tensor over a mesh; without a spec it is whole."""
    return {name: sharding(mesh, specs.get(name, [])) for name in names}


def sharding(mesh: Any, spec: Spec) -> Any:
    """Return jax's sharding of one tensor over a mesh, which may be an abstract one."""
    from jax import sharding as of_jax

    partition_spec: Any = of_jax.PartitionSpec
    return of_jax.NamedSharding(mesh, partition_spec(*[tuple(axes) or None for axes in spec]))


def mesh_of(partition: Partition, devices: Sequence[Any] | None = None) -> Any:
    """Return jax's mesh of a partition; without devices an abstract one, to trace with."""
    import numpy as np
    from jax.sharding import AbstractMesh, Mesh

    sizes, names = tuple(partition.mesh.values()), tuple(partition.mesh)
    if devices is None:
        abstract: Any = AbstractMesh
        return abstract(sizes, names)
    return Mesh(np.array(devices).reshape(sizes), names)
