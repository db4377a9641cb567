"""One program of an artifact: exported, compiled, written down and described.

For each program `build_program` leaves in the artifact's folder

- ``NAME.stablehlo``: the portable truth, a serialized ``jax.export`` for the device's platform
  and the CPU, independent of the number of devices and of the sizes that are to stay symbolic;
- ``NAME.sharded.stablehlo``: the same for as many devices as the slice has, where the model is
  annotated with how it is spread over them;
- ``NAME.simulated.stablehlo``: the same once more for as few devices as a CPU can simulate, where
  they are too many and the program is to be verified;
- ``NAME.stageN.*``: the same for each stage, where the annotations cut it (see `pipeline`);
- ``NAME.hlo.txt``: the optimized, scheduled HLO of the device's own compiler, for reading;
- ``NAME.cubin/*.cubin``: the machine code that it holds for an NVIDIA GPU, one file for each
  kernel module, for ``cuobjdump`` and its like.

What is compiled for the device is the export, not the model that it was made from.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trivium.backends.xla import hlo, partition, pipeline, rolling, sharding, simulation
from trivium.backends.xla.compiling import (
    capacity,
    compile_export,
    flops,
    machine_code,
    memory_of,
    require_fit,
    text_of,
)
from trivium.backends.xla.exporting import Json, constraints, export, outputs_of, symbols_of
from trivium.backends.xla.platforms import Device
from trivium.compiler import shapes
from trivium.compiler.passing import is_op, producer
from trivium.compiler.types import TensorInfo, Workload

if TYPE_CHECKING:
    import onnx_ir as ir

    from trivium.backends.xla.lowering.quantized import Mode


def build_program(
    name: str, dims: Mapping[str, int], job: Mapping[str, Any], device: Device, devices: list[Any]
) -> Json:
    """Export the model for one set of shapes, compile the export, and write both down.

    Args:
        dims: Sizes of the model's symbolic dimensions.
    """
    import onnx_ir as ir

    folder = Path(job["folder"])
    model = ir.load(folder / job["model"])
    shapes.bind(model, Workload(dims=dims))
    mode: Mode = "float" if device.platform == "cuda" and _convolves_integers(model) else "integer"
    if job["partition"] is None and sharding.stages(model, len(devices)) > 1:
        return _staged(name, model, mode, job, device, devices)
    attempt = partial(_attempt, name, model, mode, job, device, devices)
    made, rolled = rolling.choose(attempt, job, partial(_has_repeats, model))
    for file, content in made.files.items():
        (folder / file).write_bytes(content)
    text = made.text()
    (folder / f"{name}.hlo.txt").write_text(text, encoding="utf-8")
    memory = memory_of(made.compiled)
    require_fit(memory, capacity(job, len(devices)), job["target"])
    return {
        **_described(made.lowered, made.outputs, "float" if device.platform == "cpu" else mode),
        "stacks": dict(made.lowered.stacks),
        "rolled": rolled,
        "partition": made.split.to_json(),
        "simulated": made.shown,
        "memory": memory,
        "weights_bytes": sum(tensor.nbytes for tensor in made.lowered.weights.values()),
        "symbolic": job["symbolic"],
        "machine_code": machine_code(made.compiled, folder / f"{name}.cubin")
        if device.platform == "cuda"
        else None,
        "collectives": hlo.collectives(text),
        "compiler_flops": flops(made.compiled, text),
        "trace_seconds": round(made.trace_seconds, 3),
        "compile_seconds": round(made.compile_seconds, 3),
    }


@dataclass(frozen=True)
class Attempt:
    """A program, exported and compiled one way.

    Attributes:
        files: Its exports, by name.
        shown: What `simulation` runs of it.
        text: Returns the optimized HLO.
    """

    lowered: Any
    outputs: Sequence[TensorInfo]
    split: partition.Partition
    shown: Json | None
    files: Mapping[str, bytes]
    compiled: Any
    text: Callable[[], str]
    trace_seconds: float
    compile_seconds: float


def _has_repeats(model: ir.Model) -> bool:
    """Whether a model has layers that `lower` would roll."""
    from trivium.backends.xla.lowering import repeats
    from trivium.backends.xla.lowering.constants import weights_of

    return repeats.find(model.graph, weights_of(model)) is not None


def _attempt(
    name: str,
    model: ir.Model,
    mode: Mode,
    job: Mapping[str, Any],
    device: Device,
    devices: list[Any],
    *,
    roll: bool,
) -> Attempt:
    """Export and compile a program; with ``roll``, layers that are the same as one scan."""
    from trivium.backends.xla.lowering import lower

    started = time.perf_counter()
    on_cpu = device.platform == "cpu"
    lowered = lower(
        model,
        quantized=mode,
        platform="cpu" if on_cpu else None,
        pack=on_cpu and device.chips == 1 and not roll,
        roll=roll,
    )
    caches, sizes = job["caches"], job["symbolic"]
    exported = export(lowered, device, job["precision"], caches, symbols=symbols_of(sizes))
    files = {f"{name}.stablehlo": bytes(exported.serialize())}
    exported_at = time.perf_counter()

    outputs = outputs_of(lowered, exported)
    wish = job["partition"]
    layout = sharding.read(model, len(devices)) if wish is None else None
    if layout is None:
        split = partition.choose(lowered.inputs, outputs, len(devices), wish)
        split = partition.noting_annotations(split, model)
    else:
        split = partition.annotated(layout, model.graph, lowered.places, lowered.stacks)
    held = {"weights": sum(t.nbytes // split.shards(n) for n, t in lowered.weights.items())}
    require_fit(held, capacity(job, len(devices)), job["target"])
    spread = partial(lower, model, quantized=mode, roll=roll)
    if layout is not None:
        constrained = spread(shardings=constraints(layout, split))
        exported = export(constrained, device, job["precision"], caches, split)
        files[f"{name}.sharded.stablehlo"] = bytes(exported.serialize())
    shown = None
    if job["verified"] and split.kind not in ("single", "replicated"):
        small = partition.reduced(split)
        shown = simulation.described(name, split, small, lowered)
        if layout is not None and small != split:
            again = spread(shardings=constraints(layout, small))
            exported_small = export(again, Device("cpu"), job["precision"], caches, small)
            files[shown["file"]] = bytes(exported_small.serialize())
    exported_again_at = time.perf_counter()
    compiling = partial(compile_export, exported, lowered, split, devices, caches, sizes)
    compiled = compiling()
    done = time.perf_counter()
    return Attempt(
        lowered,
        outputs,
        split,
        shown,
        files,
        compiled,
        partial(text_of, compiled, compiling),
        exported_at - started,
        done - exported_again_at,
    )


def _described(lowered: Any, outputs: Sequence[TensorInfo], mode: Mode) -> Json:
    """What a program takes, gives, and how it was lowered."""
    return {
        "inputs": [asdict(info) for info in lowered.inputs],
        "outputs": [asdict(info) for info in outputs],
        "quantized_products": mode,
        "packed": lowered.packed,
    }


def _staged(
    name: str,
    model: ir.Model,
    mode: Mode,
    job: Mapping[str, Any],
    device: Device,
    devices: list[Any],
) -> Json:
    """What there is to say of a program in stages: of each, and of the worst and all of them."""
    from trivium.backends.xla.lowering import lower

    started = time.perf_counter()
    lowered = lower(model, quantized=mode)
    exported = export(lowered, device, job["precision"], job["caches"])
    (Path(job["folder"]) / f"{name}.stablehlo").write_bytes(exported.serialize())
    exported_at = time.perf_counter()
    stages = pipeline.build(name, model, mode, job, device, devices)
    for one in stages:
        require_fit(one["memory"], capacity(job, len(devices)), job["target"])
    configuration = sharding.name_of(model, len(devices))
    split = partition.Partition(
        "annotated",
        {"stage": len(stages), **stages[0]["partition"]["mesh"]},
        note=f"in {len(stages)} stages, one after the other, over {len(devices)} devices as the "
        f"model says: {configuration}",
    )
    shown = None
    if job["verified"]:
        shown = {
            "file": None,
            "partition": max((one["simulated"]["partition"] for one in stages), key=_devices_in),
            "bytes": sum(one["simulated"]["bytes"] for one in stages),
        }
    return {
        **_described(lowered, outputs_of(lowered, exported), mode),
        "stacks": {},
        "rolled": None,
        "partition": split.to_json(),
        "stages": stages,
        "simulated": shown,
        "memory": max((one["memory"] for one in stages), key=lambda m: sum(m.values())),
        "weights_bytes": sum(tensor.nbytes for tensor in lowered.weights.values()),
        "machine_code": None,
        "collectives": pipeline.summed(stages),
        "compiler_flops": None,
        "trace_seconds": round(exported_at - started, 3),
        "compile_seconds": round(time.perf_counter() - exported_at, 3),
    }


def _devices_in(table: Mapping[str, Any]) -> int:
    return partition.Partition.from_json(table).devices


def _convolves_integers(model: ir.Model) -> bool:
    """Whether a convolution's operands are dequantized.

    XLA has no kernel of its own for a convolution of integers on a GPU, and cuDNN takes them in
    layouts that it does not choose ahead of time.
    """
    return any(
        is_op(node, "Conv", "ConvTranspose") and producer(node.inputs[1], "DequantizeLinear")
        for node in model.graph.all_nodes()
    )
