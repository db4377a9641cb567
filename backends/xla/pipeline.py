"""A program that is cut into stages: each exported and compiled for its own part of the devices.

Runs in the worker (`build`) and where an artifact is loaded (`Chain`). What a stage hands to a
later one keeps its name from the model; the manifest lists it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trivium.backends.xla import hlo, partition, sharding, simulation
from trivium.backends.xla.compiling import compile_export, memory_of, text_of
from trivium.backends.xla.exporting import Json, constraints, export, outputs_of
from trivium.backends.xla.partition import Partition
from trivium.backends.xla.platforms import Device

if TYPE_CHECKING:
    import onnx_ir as ir

    from trivium.backends.xla.lowering.quantized import Mode


def build(
    name: str,
    model: ir.Model,
    mode: Mode,
    job: Mapping[str, Any],
    device: Device,
    devices: Sequence[Any],
) -> list[Json]:
    """Export and compile every stage of a program; write its export and HLO beside the whole's.

    Returns:
        What there is to say of each: its files, how it is spread, what it receives and sends.
    """
    from trivium.passes.sharding import stages

    count = sharding.stages(model, len(devices))
    configuration = sharding.name_of(model, len(devices))
    found = []
    for index in range(count):
        own = stages.extract(model, index, configuration)
        layout = sharding.read(own.model, len(devices), index, count)
        assert layout is not None
        per = len(devices) // count
        part = devices[index * per : (index + 1) * per]
        found.append(
            {
                **_stage(f"{name}.stage{index}", own.model, layout, mode, job, device, part),
                "receives": list(own.received),
                "sends": list(own.sent),
            }
        )
    return found


def _stage(
    name: str,
    model: ir.Model,
    layout: sharding.Layout,
    mode: Mode,
    job: Mapping[str, Any],
    device: Device,
    devices: Sequence[Any],
) -> Json:
    from trivium.backends.xla.lowering import lower

    folder = Path(job["folder"])
    inputs = {value.name for value in model.graph.inputs}
    caches = [cache for cache in job["caches"] if cache in inputs]
    split = partition.annotated(layout, model.graph, lower(model).places)

    def exported(split: Partition, device: Device, kind: str) -> tuple[Any, Any]:
        spread = split if split.devices > 1 else None
        shardings = constraints(layout, split) if spread is not None else None
        lowered = lower(model, quantized=mode, shardings=shardings)
        made = export(lowered, device, job["precision"], caches, spread)
        (folder / f"{name}.{kind}.stablehlo").write_bytes(made.serialize())
        return lowered, made

    lowered, made = exported(split, device, "sharded")
    simulated = None
    if job["verified"]:
        small = partition.reduced(split)
        simulated = simulation.described(name, split, small, lowered)
        if small != split:
            exported(small, Device("cpu"), "simulated")
    compiling = partial(compile_export, made, lowered, split, devices, caches)
    compiled = compiling()
    text = text_of(compiled, compiling)
    (folder / f"{name}.hlo.txt").write_text(text, encoding="utf-8")
    return {
        "name": name,
        "file": f"{name}.sharded.stablehlo",
        "partition": split.to_json(),
        "simulated": simulated,
        "inputs": [info.name for info in lowered.inputs],
        "outputs": [asdict(info) for info in outputs_of(lowered, made)],
        "weights": list(lowered.weights),
        "weights_bytes": sum(t.nbytes // split.shards(n) for n, t in lowered.weights.items()),
        "memory": memory_of(compiled),
        "collectives": hlo.collectives(text),
    }


def summed(stages: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """The collectives of all stages."""
    total: dict[str, dict[str, int]] = {}
    for stage in stages:
        for kind, one in stage["collectives"].items():
            entry = total.setdefault(kind, {"count": 0, "bytes": 0})
            entry["count"] += one["count"]
            entry["bytes"] += one["bytes"]
    return total


@dataclass(frozen=True)
class Link:
    """A stage that is loaded.

    Attributes:
        function: Of weights and inputs by name, and of caches if it has some.
        inputs: What it takes, caches left out.
        given: How each input and cache is spread.
    """

    function: Callable[..., Mapping[str, Any]]
    weights: Mapping[str, Any]
    inputs: Sequence[str]
    caches: Sequence[str]
    given: Mapping[str, Any]


class Chain:
    """All stages of a program, called as the whole is; it has its weights already."""

    def __init__(self, links: Sequence[Link], outputs: Sequence[str]) -> None:
        self.links, self.outputs = links, outputs

    def __call__(
        self, weights: Any, inputs: Mapping[str, Any], held: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        import jax

        known = dict(inputs)
        for link in self.links:
            moved = {name: jax.device_put(known[name], link.given[name]) for name in link.inputs}
            own = {name: (held or {})[name] for name in link.caches}
            known |= link.function(link.weights, moved, *([own] if own else []))
        return {name: known[name] for name in self.outputs}
