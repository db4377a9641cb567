"""A mesh of devices, and ONNX's multi-device annotation of a value that is spread over it.

ONNX knows devices by number only: a `ShardingSpec` lists which device, or group of devices, holds
each shard. Device ``(p * dp + d) * tp + t`` of a mesh ``pp=..,dp=..,tp=..`` is the t-th of the d-th
row of stage p.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product

import onnx_ir as ir

from trivium.compiler.errors import BadInput

DATA, TENSOR, STAGES = "dp", "tp", "pp"
_AXIS = re.compile(r"(\w+)=([1-9]\d*)")


@dataclass(frozen=True)
class Mesh:
    """Devices in a grid.

    Attributes:
        data: How many parts the batch is split into.
        tensor: How many devices share the weights.
        stages: Into how many parts, one after the other, the layers are cut.
    """

    data: int = 1
    tensor: int = 1
    stages: int = 1

    @property
    def sizes(self) -> dict[str, int]:
        """Length by name of the axes of one stage, the one that moves slowest first."""
        return {DATA: self.data, TENSOR: self.tensor}

    @property
    def devices_of_stage(self) -> int:
        """How many devices a stage has."""
        return self.data * self.tensor

    @property
    def devices(self) -> int:
        """How many devices there are."""
        return self.stages * self.devices_of_stage

    def __str__(self) -> str:
        sizes = {STAGES: self.stages, **self.sizes} if self.stages > 1 else self.sizes
        return ",".join(f"{name}={size}" for name, size in sizes.items())


def parse(text: str) -> Mesh:
    """Read ``pp=2,dp=2,tp=4``; an axis that is left out has length 1.

    Raises:
        BadInput: Not of that form, an unknown axis, or one that is named twice.
    """
    sizes: dict[str, int] = {}
    for item in text.split(","):
        match = _AXIS.fullmatch(item.strip())
        if match is None or match[1] not in (STAGES, DATA, TENSOR) or match[1] in sizes:
            raise BadInput(
                f"{item.strip()!r} is no axis of a mesh, or one given twice",
                about=f"mesh={text}",
                remedy=f"{DATA}=N splits the batch, {TENSOR}=N the weights, {STAGES}=N cuts the "
                f"layers: {STAGES}=2,{DATA}=2,{TENSOR}=4",
            )
        sizes[match[1]] = int(match[2])
    return Mesh(sizes.get(DATA, 1), sizes.get(TENSOR, 1), sizes.get(STAGES, 1))


def of_size(devices: int) -> Iterator[Mesh]:
    """All meshes of so many devices: those of few stages first, of those the ones of small tp."""
    for stages in divisors(devices):
        for tensor in divisors(devices // stages):
            yield Mesh(devices // stages // tensor, tensor, stages)


def divisors(number: int) -> list[int]:
    """What divides a number, ascending."""
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def spec(mesh: Mesh, value: ir.Value, split: Mapping[int, str], stage: int = 0) -> ir.ShardingSpec:
    """Return the annotation of a value on the devices of a stage: ``split`` says which axis goes
    along which of the mesh.

    The shards are listed in the order of the value's axes, the last one moving fastest.
    """
    axes = sorted(split)
    sizes = mesh.sizes
    shape = value.shape
    assert shape is not None
    groups: dict[tuple[int, ...], list[int]] = {
        at: [] for at in product(*(range(sizes[split[axis]]) for axis in axes))
    }
    first = stage * mesh.devices_of_stage
    for device, place in enumerate(product(*map(range, sizes.values())), first):
        at = dict(zip(sizes, place, strict=True))
        groups[tuple(at[split[axis]] for axis in axes)].append(device)
    entries = []
    holders = []
    for index, members in enumerate(groups.values()):
        if len(members) == 1:
            holders.append(members[0])
            continue
        holders.append(-1 - index)
        entries.append(ir.IndexToDeviceGroupMapEntry(-1 - index, tuple(members)))
    return ir.ShardingSpec(
        value,
        tuple(holders),
        tuple(entries),
        tuple(
            ir.ShardedDim(axis, (ir.SimpleShardedDim(shape[axis], sizes[split[axis]]),))
            for axis in axes
        ),
    )
