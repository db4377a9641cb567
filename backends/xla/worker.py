"""The process that compiles: ``python -m trivium.backends.xla.worker JOB.json RESULT.json``.

A process of its own, because libtpu and the CUDA plug-in must be configured before jax is
imported (the caller may have imported it long ago, for another device), because a crash inside
of a compiler must not take the caller along, and so that time and memory can be bounded and
measured. Job and result are JSON, everything else goes through files; nothing is pickled.

For each program of the job it leaves in the artifact's folder

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

import ctypes
import json
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trivium.backends.xla import hlo, partition, pipeline, platforms, riegeli, rolling, sharding
from trivium.backends.xla.platforms import Device
from trivium.compiler import shapes
from trivium.compiler.errors import BackendFailed, TriviumError, Unsupported
from trivium.compiler.onnx_api import one_line
from trivium.compiler.passing import is_op, producer
from trivium.compiler.types import TensorInfo, Workload

if TYPE_CHECKING:
    import onnx_ir as ir

    from trivium.backends.xla.lowering.quantized import Mode

Json = dict[str, Any]


def main(arguments: Sequence[str]) -> int:
    """Read the job, do it, write the result; the exit status is 0 if there is a result."""
    job_path, result_path = map(Path, arguments)
    job = json.loads(job_path.read_text(encoding="utf-8"))
    _end_with(job["caller"])
    try:
        result = build(job)
    except TriviumError as error:
        result = {"error": error_json(error)}
    except Exception as error:  # jax raises many kinds; the caller gets one line of them
        result = {"error": error_json(translated(error, job["target"]))}
    usage = resource.getrusage(resource.RUSAGE_SELF)
    result["peak_rss_bytes"] = _peak_rss_bytes()
    result["cpu_seconds"] = round(usage.ru_utime + usage.ru_stime, 3)
    unfinished = result_path.with_suffix(".partial")
    unfinished.write_text(json.dumps(result), encoding="utf-8")
    os.replace(unfinished, result_path)
    return 0


def _peak_rss_bytes() -> int | None:
    """This process's largest resident size; getrusage's would begin with that of the caller."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if "VmHWM" in line)


def _end_with(caller: int) -> None:
    """Have the kernel end this process with the one that waits for it, where Linux can."""
    if sys.platform == "linux":
        parent_death_signal = 1
        ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGKILL)
        if os.getppid() != caller:  # it has ended already
            sys.exit(1)


def error_json(error: TriviumError) -> Json:
    """An error as JSON, for `process.raised`."""
    # The lowering has subclasses of its own, which the caller need not know.
    kind = next(one for one in type(error).__mro__ if one.__module__ == TriviumError.__module__)
    return {
        "type": kind.__name__,
        "cause": error.cause,
        "about": error.about,
        "remedy": error.remedy,
        "refusals": list(getattr(error, "refusals", ())),
    }


def translated(error: Exception, target: str) -> TriviumError:
    """The error of ours that says what one of jax's does, in a line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0] if lines else type(error).__name__
    if first.endswith(":") and len(lines) > 1:
        first = f"{first} {lines[1]}"
    notes = "; ".join(getattr(error, "__notes__", ()))
    cause = f"{first} ({notes})" if notes else first
    if "RESOURCE_EXHAUSTED" in first:
        return Unsupported(
            f"the program does not fit into the device's memory: {first[:300]}",
            about=target,
            remedy="use a larger slice, a smaller batch, or a recipe with smaller weights",
        )
    return BackendFailed(cause[:500], about=f"XLA for {target}")


def build(job: Mapping[str, Any]) -> Json:
    """Export and compile every program of a job; return what there is to say of each."""
    started = time.perf_counter()
    device = Device(**job["device"])
    devices = compile_devices(device)
    ready = time.perf_counter()
    programs = {
        name: build_program(name, dims, job, device, devices)
        for name, dims in job["programs"].items()
    }
    return {
        "programs": programs,
        "device_kind": devices[0].device_kind,
        "devices": len(devices),
        "start_seconds": round(ready - started, 3),
    }


def compile_devices(device: Device) -> list[Any]:
    """Return jax's devices to compile for: a topology's, which exist on paper only, or the CPU."""
    import jax
    from jax.experimental import topologies

    if device.platform == "cpu":
        return jax.devices("cpu")[: device.chips]
    if device.platform == "tpu":
        options = {"chip_config_name": device.chip_config} if device.chip_config else {}
        topology = topologies.get_topology_desc(
            platform="tpu", topology_name=device.topology or "", **options
        )
    else:
        topology = topologies.get_topology_desc(
            platform="cuda",
            target_config=platforms.gpu_description(device.gpu_target or ""),
            topology=f"1x{device.chips}x1",
        )
    return list(topology.devices)


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
    _require_fit(memory, _capacity(job, len(devices)), job["target"])
    return {
        **_described(made.lowered, made.outputs, mode),
        "stacks": dict(made.lowered.stacks),
        "rolled": rolled,
        "partition": made.split.to_json(),
        "simulated": made.shown,
        "memory": memory,
        "weights_bytes": sum(tensor.nbytes for tensor in made.lowered.weights.values()),
        "symbolic": job["symbolic"],
        "machine_code": _machine_code(made.compiled, folder / f"{name}.cubin")
        if device.platform == "cuda"
        else None,
        "collectives": hlo.collectives(text),
        "compiler_flops": _flops(made.compiled, text),
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
    _require_fit(held, _capacity(job, len(devices)), job["target"])
    spread = partial(lower, model, quantized=mode, roll=roll)
    if layout is not None:
        constrained = spread(shardings=constraints(layout, split))
        exported = export(constrained, device, job["precision"], caches, split)
        files[f"{name}.sharded.stablehlo"] = bytes(exported.serialize())
    shown = None
    if job["verified"] and split.kind not in ("single", "replicated"):
        small = partition.reduced(split)
        shown = simulated(name, split, small, lowered)
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
        _require_fit(one["memory"], _capacity(job, len(devices)), job["target"])
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


def simulated(
    name: str, split: partition.Partition, small: partition.Partition, lowered: Any
) -> Json:
    """What `simulation` runs of a program that is spread: its export if it is another, how that
    is spread, and the bytes of all shards of the weights together.
    """
    kind = "sharded" if small == split else "simulated"
    copies = {n: small.devices // small.shards(n) for n in lowered.weights}
    return {
        "file": f"{name}.{kind}.stablehlo" if split.kind == "annotated" else None,
        "partition": small.to_json(),
        "bytes": sum(tensor.nbytes * copies[n] for n, tensor in lowered.weights.items()),
    }


def _convolves_integers(model: ir.Model) -> bool:
    """Whether a convolution's operands are dequantized.

    XLA has no kernel of its own for a convolution of integers on a GPU, and cuDNN takes them in
    layouts that it does not choose ahead of time.
    """
    return any(
        is_op(node, "Conv", "ConvTranspose") and producer(node.inputs[1], "DequantizeLinear")
        for node in model.graph.all_nodes()
    )


def constraints(layout: sharding.Layout, split: partition.Partition) -> dict[ir.Value, Any]:
    """Return jax's sharding of every annotated value, over no devices in particular."""
    mesh = partition.mesh_of(split)
    return {value: partition.sharding(mesh, spec) for value, spec in layout.specs.items()}


def export(
    lowered: Any,
    device: Device,
    precision: str,
    caches: Sequence[str] = (),
    split: partition.Partition | None = None,
    symbols: Mapping[str, Any] | None = None,
) -> Any:
    """Return the ``jax.export.Exported`` of a lowered model, for its platform and the CPU.

    It takes weights and inputs by name, and a third table with those inputs that are caches, if
    there are any, so that a caller can donate them.

    Args:
        split: How it is spread, if it is exported for as many devices as that says.
        precision: Of float32 products: ``highest`` computes them in float32; ``default`` lets a
            TPU round the factors to bfloat16 and a GPU to TF32; ``high`` is between.
        symbols: What stays symbolic, by the model's name of the dimension.

    Raises:
        Unsupported: An operator needs a number where there is a symbol.
    """
    import jax
    import jax.export

    from trivium.backends.xla.lowering import precise

    names = [device.platform] if device.platform == "cpu" else [device.platform, "cpu"]
    with precise(), jax.default_matmul_precision(precision):
        spread = {}
        if split is not None:
            spread = in_and_out(split, partition.mesh_of(split), lowered, caches)
        plain = lowered.function
        function = jax.jit(_taking_caches(plain) if caches else plain, **spread)
        try:
            return jax.export.export(function, platforms=names)(*avals(lowered, caches, symbols))
        except TriviumError:
            raise
        except Exception as error:  # jax raises many kinds for what it cannot do with symbols
            if not symbols:
                raise
            raise Unsupported(
                f"XLA cannot have it with {' and '.join(symbols)} symbolic: {one_line(error)}",
                remedy="fix the dimension with --shape DIM=SIZE",
            ) from error


def symbols_of(names: Iterable[str]) -> dict[str, Any]:
    """Return jax's symbolic dimension for each of a model's, all of one scope."""
    import jax.export

    scope = jax.export.SymbolicScope()
    spelled = {
        name: name if name.isidentifier() and name not in _OPERATORS else f"dim{index}"
        for index, name in enumerate(names)
    }
    return {name: jax.export.symbolic_shape(word, scope=scope)[0] for name, word in spelled.items()}


_OPTIMIZED = ".after_optimizations.txt"
"""How the names end of what the compiler dumps of its optimized modules."""
_OPERATORS = ("floordiv", "max", "min", "mod", "non_negative")
"""Words that mean something else in jax's notation of symbolic dimensions."""


def _taking_caches(function: Callable[[Json, Json], Json]) -> Callable[[Json, Json, Json], Json]:
    return lambda weights, inputs, held: function(weights, {**inputs, **held})


def avals(
    lowered: Any, caches: Sequence[str] = (), sizes: Mapping[str, Any] | None = None
) -> tuple[Json, ...]:
    """Return the shapes and dtypes of a lowered model's weights, inputs and caches.

    Args:
        sizes: Of the dimensions that the model leaves open: numbers, or jax's symbols.
    """
    import jax

    from trivium.compiler.samples import numpy_dtype

    aval: Any = jax.ShapeDtypeStruct
    weights = {}
    for name, tensor in lowered.weights.items():
        shape = tensor.shape.numpy()
        order = lowered.packed.get(name, range(len(shape)))
        weights[name] = aval(tuple(shape[axis] for axis in order), tensor.dtype.numpy())
    known = sizes or {}
    inputs = {
        info.name: aval(tuple(known.get(d, d) for d in info.shape), numpy_dtype(info.dtype))
        for info in lowered.inputs
    }
    return weights, *_apart(inputs, caches)


def _apart(inputs: Json, caches: Sequence[str]) -> tuple[Json, ...]:
    """A table of inputs, and one of those that are caches, if there are any."""
    if not caches:
        return (inputs,)
    own = {name: value for name, value in inputs.items() if name not in caches}
    return own, {name: inputs[name] for name in caches}


def outputs_of(lowered: Any, exported: Any) -> tuple[TensorInfo, ...]:
    """The outputs with the shapes that tracing found; the model may leave theirs open."""
    import jax

    found = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    return tuple(
        replace(
            info,
            shape=tuple(d if isinstance(d, int) else str(d) for d in found[info.name].shape),
        )
        for info in lowered.outputs
    )


def compile_export(
    exported: Any,
    lowered: Any,
    split: partition.Partition,
    devices: Sequence[Any],
    caches: Sequence[str] = (),
    sizes: Mapping[str, int] | None = None,
    dump: Path | None = None,
) -> Any:
    """Compile an export for a mesh of devices, spread as the partition says.

    What it leaves symbolic is compiled at the given sizes. Caches are donated: the new ones are
    written where the old ones were. Into ``dump`` the compiler writes its modules as text.
    """
    import jax

    from trivium.backends.xla.lowering import precise

    mesh = partition.mesh_of(split, devices)
    options = dict(platforms.compiler_options(devices[0].platform) or {})
    if dump is not None:
        options |= {"xla_dump_to": str(dump), "xla_dump_hlo_as_text": True}
    with precise():
        program = jax.jit(
            exported.call,
            donate_argnums=(2,) if caches else (),
            compiler_options=options,
            **in_and_out(split, mesh, lowered, caches),
        )
        return program.lower(*avals(lowered, caches, sizes)).compile()


def text_of(compiled: Any, again: Callable[..., Any]) -> str:
    """Return the optimized HLO of a compiled program.

    Where jaxlib cannot read what the compiler gives it (libtpu's asynchronous updates of several
    operands), the program is compiled a second time and the compiler writes the text itself.

    Args:
        again: Compiles the same program with a folder for `compile_export`'s ``dump``.
    """
    import jax

    try:
        return str(compiled.as_text())
    except jax.errors.JaxRuntimeError:
        with tempfile.TemporaryDirectory() as name:
            again(dump=Path(name))
            written = sorted(Path(name).glob(f"*{_OPTIMIZED}"))
            if not written:
                raise
            return "\n\n".join(file.read_text(encoding="utf-8") for file in written)


def in_and_out(
    split: partition.Partition, mesh: Any, lowered: Any, caches: Sequence[str] = ()
) -> dict[str, Any]:
    """Return what jit is told of how arguments and results are spread."""
    inputs = [info.name for info in lowered.inputs]
    outputs = [info.name for info in lowered.outputs]
    return {
        "in_shardings": (
            partition.shardings(mesh, lowered.weights, split.weights),
            *_apart(partition.shardings(mesh, inputs, split.inputs), caches),
        ),
        "out_shardings": partition.shardings(mesh, outputs, split.outputs),
    }


def _flops(compiled: Any, text: str) -> float | None:
    """The compiler's count of floating-point operations on one device.

    The one figure of XLA's own cost analysis that can be relied on, and only without loops, whose
    bodies it counts once. Its seconds and bytes are off by up to a factor of six.
    """
    flops = (compiled.cost_analysis() or {}).get("flops", 0.0)
    return float(flops) if flops > 0 and not hlo.has_loop(text) else None


def _machine_code(compiled: Any, folder: Path) -> Json:
    """Write down the cubins of a GPU executable; say how many, how large, for which architecture.

    What it leaves to a library (cuDNN, cuBLAS) has none.
    """
    try:
        images = hlo.cubins(riegeli.values(compiled.runtime_executable().serialize()))
    except ValueError as error:
        return {"cubins": None, "reason": str(error)}
    folder.mkdir()
    for index, image in enumerate(images):
        (folder / f"{index:03}.cubin").write_bytes(image)
    return {
        "cubins": len(images),
        "bytes": sum(map(len, images)),
        "compute_capability": sorted({hlo.compute_capability(image) for image in images}),
    }


def memory_of(compiled: Any) -> dict[str, int]:
    """The compiler's own account of one device's memory, in bytes; the parts add up to all of it.

    What outputs share with donated arguments is counted in both, and so negative once.
    """
    stats = compiled.memory_analysis()
    return {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
        "aliased": -stats.alias_size_in_bytes,
    }


def _capacity(job: Mapping[str, Any], devices: int) -> float | None:
    """Bytes of one jax device: a chip's memory, shared by the devices that the chip shows as."""
    chip = job.get("memory_bytes")
    return None if chip is None else chip * job["device"]["chips"] / devices


def _require_fit(parts: Mapping[str, int], capacity: float | None, target: str) -> None:
    needed = sum(parts.values())
    if capacity is None or needed <= capacity:
        return
    figures = ", ".join(f"{part} {size:,}" for part, size in parts.items() if size)
    raise Unsupported(
        f"it needs {needed:,} bytes on each device ({figures}), and a device has {capacity:,.0f}",
        about=target,
        remedy="use a larger device, a smaller batch, or a recipe with smaller weights",
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
