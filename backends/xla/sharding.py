"""ONNX's multi-device annotations as a mesh and a sharding of each value.

The standard numbers devices and lists, for each shard of a value, who holds it. jax wants a mesh
with named axes. A value's axis that is split into n parts follows an axis of the mesh if device d
holds part ``d // stride % n`` for some stride; all the (n, stride) of a model together cut the
numbers 0..N-1 into the coarsest mesh in which each of them is one axis or several adjacent ones.
Nothing here knows which pass, or whose, made the annotations.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise, product

import onnx_ir as ir

from trivium.compiler.errors import BadInput, Unsupported

Spec = list[list[str]]
"""For each axis of a tensor, the axes of the mesh that it is spread along; short or empty where
the rest is whole."""


@dataclass(frozen=True)
class Layout:
    """How the values of a model are spread over a mesh.

    Attributes:
        name: What the model calls the configuration.
        mesh: Length of each axis by name, the one that moves slowest first.
        specs: Of the annotated values.
    """

    name: str
    mesh: Mapping[str, int]
    specs: Mapping[ir.Value, Spec]

    def of(self, values: Iterable[ir.Value]) -> dict[str, Spec]:
        """The specs of some values by name; one that is not annotated is whole."""
        return {value.name or "": self.specs.get(value, []) for value in values}


def stages(model: ir.Model, devices: int) -> int:
    """Into how many stages, one after the other, a model wants to be cut; 1 if it does not say."""
    configuration = _configuration(model, devices)
    if configuration is None:
        return 1
    count = 1
    for node in model.graph:
        for entry in node.device_configurations:
            named = entry.configuration.name if entry.configuration is not None else None
            if named == configuration.name:
                count = max(count, (entry.pipeline_stage or 0) + 1)
    if devices % count:
        raise BadInput(
            f"its {count} stages do not share {devices} devices evenly",
            about=f"device configuration {configuration.name}",
        )
    return count


def name_of(model: ir.Model, devices: int) -> str:
    """What a model calls its configuration for so many devices; empty if it has none."""
    configuration = _configuration(model, devices)
    return "" if configuration is None else configuration.name


def read(model: ir.Model, devices: int, stage: int = 0, count: int = 1) -> Layout | None:
    """Return how a model wants to be spread over so many devices, or None if it does not say.

    Args:
        stage, count: The model is stage ``stage`` of ``count``, each of which has its own part of
            the devices.

    Raises:
        BadInput: It is annotated for other numbers of devices only, or twice for this one, or an
            axis does not divide.
        Unsupported: Annotations that contradict each other or make no mesh.
    """
    configuration = _configuration(model, devices)
    if configuration is None:
        return None
    devices //= count
    own = range(stage * devices, (stage + 1) * devices)
    found: dict[ir.Value, dict[int, _Part]] = {}
    for node in model.graph:
        for entry in node.device_configurations:
            named = entry.configuration.name if entry.configuration is not None else None
            for spec in entry.sharding_specs if named == configuration.name else ():
                _add(found, spec, own)
    edges = sorted({1, devices} | {edge for dims in found.values() for p in dims.values()
                                   for edge in (p.stride, p.stride * p.count)})  # fmt: skip
    if any(upper % lower for lower, upper in pairwise(edges)):
        raise Unsupported(
            f"its splits make no mesh of {devices} devices",
            about=f"device configuration {configuration.name}",
            remedy="let each split run along an axis of one mesh",
        )
    mesh = {f"x{lower}": upper // lower for lower, upper in reversed(list(pairwise(edges)))}
    specs = {value: _spec(value, dims, edges) for value, dims in found.items()}
    return Layout(configuration.name, mesh or {"x1": 1}, specs)


def _configuration(model: ir.Model, devices: int) -> ir.ModelConfiguration | None:
    """The one device configuration of a model for so many devices; None if it has none at all."""
    if devices == 1 or not model.device_configurations:
        return None
    fitting = [one for one in model.device_configurations if one.num_devices == devices]
    if len(fitting) != 1:
        given = fitting or model.device_configurations
        names = "; ".join(f"{one.name} ({one.num_devices} devices)" for one in given)
        raise BadInput(
            f"the model is annotated for {names}, and the target has {devices} devices",
            about="sharding",
            remedy=f"annotate it for one mesh whose axes multiply to {devices}, e.g. dp={devices}, "
            "or give --option partition=batch",
        )
    return fitting[0]


@dataclass(frozen=True)
class _Part:
    """Device d holds part ``d // stride % count``."""

    count: int
    stride: int


def _add(found: dict[ir.Value, dict[int, _Part]], spec: ir.ShardingSpec, own: range) -> None:
    value = spec.value
    if value is None or not spec.device:
        return
    parts = _parts(spec, own)
    if found.setdefault(value, parts) != parts:
        raise Unsupported(
            "two nodes want it split in different ways",
            about=value.name or "",
            remedy="annotate a value the same at each node that reads or makes it",
        )


def _parts(spec: ir.ShardingSpec, own: range) -> dict[int, _Part]:
    """How each axis of a value is split; by a negative number as by the same from the left."""
    assert spec.value is not None
    name = spec.value.name or ""
    counts: dict[int, int] = {}
    for dim in spec.sharded_dims:
        if len(dim.simple_shardings) != 1:
            raise Unsupported(
                f"axis {dim.axis} is split by its factors", about=name, remedy="split it as one"
            )
        rank = len(spec.value.shape) if spec.value.shape is not None else 0
        axis = dim.axis + rank if dim.axis < 0 else dim.axis
        counts[axis] = dim.simple_shardings[0].num_shards
    groups = {entry.key: entry.value for entry in spec.index_to_device_group_map}
    places = list(product(*(range(count) for count in counts.values())))
    held: dict[int, tuple[int, ...]] = {}
    for place, holder in zip(places, spec.device, strict=False):
        for device in groups.get(holder, (holder,)):
            held[device] = place
    if len(places) != len(spec.device) or sorted(held) != list(own):
        raise Unsupported(
            f"its {len(places)} shards are not spread over all of {len(own)} devices",
            about=name,
            remedy="give each shard a device, and each device a shard",
        )
    parts = {}
    for number, (axis, count) in enumerate(counts.items()):
        column = [held[device][number] for device in own]
        stride = column.index(1) if count > 1 else 0
        if count > 1 and column != [d // stride % count for d in range(len(own))]:
            raise Unsupported(
                f"the shards along its axis {axis} lie on devices in no order that a mesh has",
                about=name,
                remedy="number the devices along the axes of a mesh",
            )
        if count > 1:
            parts[axis] = _Part(count, stride)
    return parts


def _spec(value: ir.Value, parts: Mapping[int, _Part], edges: list[int]) -> Spec:
    spec: Spec = [[] for _ in range(max(parts, default=-1) + 1)]
    for axis, part in parts.items():
        size = value.shape[axis] if value.shape is not None else None
        if isinstance(size, int) and size % part.count:
            raise BadInput(
                f"axis {axis} has {size} entries, which do not divide over {part.count} devices",
                about=value.name or "",
                remedy=f"bind it to a multiple of {part.count} with --shape, or use another mesh",
            )
        inside = [lower for lower, upper in pairwise(edges) if _covers(part, lower, upper)]
        spec[axis] = [f"x{lower}" for lower in reversed(inside)]
    return spec


def _covers(part: _Part, lower: int, upper: int) -> bool:
    return part.stride <= lower and upper <= part.stride * part.count
