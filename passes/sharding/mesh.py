"""A mesh of devices, and ONNX's multi-device annotation of a value that is spread over it.

ONNX knows devices by number only: a `ShardingSpec` lists which device, or group of devices, holds
each shard. Device ``d * tp + t`` of a mesh ``dp=..,tp=..`` is the t-th of its d-th row.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

import onnx_ir as ir

from trivium.compiler.errors import BadInput

DATA, TENSOR = "dp", "tp"
_AXIS = re.compile(r"(\w+)=([1-9]\d*)")


@dataclass(frozen=True)
class Mesh:
    """Devices in a grid.

    Attributes:
        data: How many parts the batch is split into.
        tensor: How many devices share the weights.
    """

    data: int = 1
    tensor: int = 1

    @property
    def sizes(self) -> dict[str, int]:
        """Length by name, the axis that moves slowest first."""
        return {DATA: self.data, TENSOR: self.tensor}

    @property
    def devices(self) -> int:
        """How many devices there are."""
        return self.data * self.tensor

    def __str__(self) -> str:
        return ",".join(f"{name}={size}" for name, size in self.sizes.items())


def parse(text: str) -> Mesh:
    """Read ``dp=2,tp=4``; an axis that is left out has length 1.

    Raises:
        BadInput: Not of that form, an unknown axis, or one that is named twice.
    """
    sizes: dict[str, int] = {}
    for item in text.split(","):
        match = _AXIS.fullmatch(item.strip())
        if match is None or match[1] not in (DATA, TENSOR) or match[1] in sizes:
            raise BadInput(
                f"{item.strip()!r} is no axis of a mesh, or one given twice",
                about=f"mesh={text}",
                remedy=f"{DATA}=N splits the batch, {TENSOR}=N the weights: {DATA}=2,{TENSOR}=4",
            )
        sizes[match[1]] = int(match[2])
    return Mesh(sizes.get(DATA, 1), sizes.get(TENSOR, 1))


def spec(mesh: Mesh, value: ir.Value, split: Mapping[int, str]) -> ir.ShardingSpec:
    """Return the annotation of a value: ``split`` says which axis goes along which of the mesh.

    The shards are listed in the order of the value's axes, the last one moving fastest.
    """
    axes = sorted(split)
    sizes = mesh.sizes
    shape = value.shape
    assert shape is not None
    groups: dict[tuple[int, ...], list[int]] = {
        at: [] for at in product(*(range(sizes[split[axis]]) for axis in axes))
    }
    for device, place in enumerate(product(*map(range, sizes.values()))):
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
