"""The XLA backend: ONNX through JAX to a TPU slice or an NVIDIA GPU, ahead of time and without
the device, or to this CPU.

What it must know of a target is in `platforms`, how a slice is used in `partition`, when layers
that are the same run as one loop in `rolling`. Products of float32 are computed in float32 unless
the option ``precision`` says otherwise: a TPU would round their factors to bfloat16 and a GPU to
TF32, and no run on a CPU would show it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trivium.backends.xla import platforms, process, rolling, weights
from trivium.compiler import links, samples, shapes
from trivium.compiler import model as models
from trivium.compiler.artifact import Artifact
from trivium.compiler.backend import BuildRequest, Executable
from trivium.compiler.errors import BadInput
from trivium.compiler.generator import program_sizes
from trivium.compiler.options import Amount, OneOf, Option, values_of
from trivium.compiler.passing import opset_of
from trivium.compiler.types import Built, Estimate, Program, Target, TensorInfo, Workload

if TYPE_CHECKING:
    import onnx_ir as ir

    from trivium.compiler.cost import Profile

WEIGHTS = "weights.safetensors"
MODEL = "model.onnx"


class XlaBackend:
    """XLA for TPU, NVIDIA GPU and CPU."""

    name = "xla"
    cache_form = "static"
    options = (
        Option("partition", OneOf(("batch", "replicated")), "how a slice is used, whatever the "
               "model says"),
        Option("precision", OneOf(("highest", "high", "default")), "of float32 products on a TPU "
               "or GPU", "highest"),
        Option("scan", OneOf(rolling.CHOICES), "run layers that are the same as one loop", "auto"),
        Option("scan_after", Amount("seconds"), "that a compile takes before `auto` tries a loop",
               rolling.SOON),
        Option("deadline", Amount("seconds"), "that the compiler may take", process.DEADLINE_S),
    )  # fmt: skip
    spreads = True
    """It follows a model's annotations of how it is spread over the devices of a slice."""

    def available(self) -> str | None:
        return platforms.missing()

    def toolchain(self) -> dict[str, str]:
        return platforms.versions()

    def legalize(self, target: Target) -> Sequence[ir.passes.PassBase]:
        """Where there are several devices and nobody has said how to use them, pick a mesh."""
        if links.devices_of(target) == 1:
            return ()
        from trivium.passes.shard import Shard

        return (Shard(target=target, backend=self.name),)

    def refuses(self, node: ir.Node, target: Target) -> str | None:
        from trivium.backends.xla.lowering import refusal

        return refusal(node, opset_of(node))

    def estimate(self, model: ir.Model, target: Target, workload: Workload) -> Estimate:
        from trivium.backends.xla import cost

        return cost.estimate(model, target, workload)

    def profile(self, target: Target) -> Profile:
        from trivium.backends.xla import cost

        return cost.profile_for(target)

    def build(self, model: ir.Model, request: BuildRequest) -> Built:
        target = request.target
        device = platforms.device_of(target)
        platforms.require(device.platform, target.name)
        chosen = values_of(self, request.options)
        generator = request.generator
        if generator is None:
            cases = {_case_name(case): dict(case.dims) for case in shapes.each(request.workload)}
        else:
            own = program_sizes(generator, models.signature(model)[0])
            cases = {name: {**request.workload.dims, **fixed} for name, fixed in own.items()}
        sizes = _representative(model, request, device)
        shapes.require_static(
            _without_buckets(model, request.workload),
            "XLA",
            _keeping_one(model) if device.chips == 1 and generator is None else "",
        )
        write_model(model, request.folder, MODEL)
        job = {
            "folder": str(request.folder.resolve()),
            "model": MODEL,
            "programs": cases,
            "symbolic": sizes,
            "target": target.name,
            "device": asdict(device),
            "memory_bytes": target.memory_bytes,
            **{name: value for name, value in chosen.items() if name != "deadline"},
            "verified": bool(request.expected),
            "caches": [cache.past for cache in generator.caches] if generator else [],
        }
        result = process.run(job, platforms.environment(device), chosen["deadline"])
        return Built(
            programs=tuple(
                Program(
                    name,
                    f"{name}.stablehlo",
                    _tensor_infos(one.pop("inputs")),
                    _tensor_infos(one.pop("outputs")),
                )
                for name, one in result["programs"].items()
            ),
            weights=WEIGHTS,
            memory=_memory(result, device),
            details={"xla": {**result, "device": asdict(device)}},
            notes=_notes(result, device, chosen["precision"], sizes),
        )

    def load(self, artifact: Artifact) -> Executable:
        from trivium.backends.xla.generating import load

        return self._loaded(artifact, load)

    def load_to_verify(self, artifact: Artifact) -> Executable:
        """Load what is spread over devices that are not here onto simulated ones."""
        from trivium.backends.xla import executable, generating, simulation

        def load(artifact: Artifact) -> Executable:
            details = artifact.manifest["details"]["xla"]
            if not simulation.devices_of(artifact) or executable.is_here(details):
                return generating.load(artifact)
            reason = simulation.hindrance(artifact)
            if reason is None:
                return simulation.Simulation(artifact)
            alone = generating.load(artifact)
            alone.where += f"; not run as it is spread over devices: {reason}"
            return alone

        return self._loaded(artifact, load)

    def _loaded(self, artifact: Artifact, load: Callable[[Artifact], Executable]) -> Executable:
        platforms.require("cpu", str(artifact.path))
        try:
            return load(artifact)
        except KeyError as error:
            raise BadInput(
                f"its manifest lacks {error}",
                about=str(artifact.path),
                remedy="compile the model again",
            ) from error


def _case_name(case: Workload) -> str:
    """What the program of one combination of buckets is called: ``main`` if there is but one."""
    name = "-".join(f"{dim}{case.dims[dim]}" for dim in case.buckets)
    return re.sub(r"[^\w-]", "_", name) or "main"


def _without_buckets(model: ir.Model, workload: Workload) -> list[TensorInfo]:
    """The model's inputs, its bucketed dimensions, and those that are to stay symbolic, taken as
    fixed."""
    settled = {*workload.buckets, *workload.symbolic}
    return [
        replace(info, shape=tuple(0 if dim in settled else dim for dim in info.shape))
        for info in models.signature(model)[0]
    ]


def _keeping_one(model: ir.Model) -> str:
    """What else than fixing all dimensions would do, where the model has a name for one."""
    dims = [dim for info in models.signature(model)[0] for dim in info.shape]
    first = next((dim for dim in dims if isinstance(dim, str) and dim != "?"), None)
    return f", or keep {first} symbolic: --shape {first}=?" if first is not None else ""


def _representative(
    model: ir.Model, request: BuildRequest, device: platforms.Device
) -> dict[str, int]:
    """Sizes to compile at, for the compiler's account, of the dimensions that stay symbolic.

    Raises:
        BadInput: They cannot, on a slice or in a generator.
    """
    inputs = models.signature(model)[0]
    defaults = samples.default_dims(inputs, request.workload)
    used = {dim for info in inputs for dim in info.shape}
    sizes = {dim: defaults[dim] for dim in request.workload.symbolic if dim in used}
    why = "a slice of several devices" if device.chips > 1 else "a generator"
    if sizes and (device.chips > 1 or request.generator is not None):
        raise BadInput(
            f"{why} needs every dimension fixed, and {next(iter(sizes))} is to stay symbolic",
            about=request.target.name,
            remedy="give it a size with --shape",
        )
    return sizes


def _tensor_infos(tables: Sequence[Mapping[str, Any]]) -> tuple[TensorInfo, ...]:
    return tuple(TensorInfo(t["name"], t["dtype"], tuple(t["shape"])) for t in tables)


def write_model(model: ir.Model, folder: Path, name: str) -> None:
    """Write a legalized model and its weights, each weight once, into ``weights.safetensors``.

    The ``.onnx`` file refers to the weights in place: ONNX's external data may lie anywhere in a
    file, so also inside of a safetensors file.
    """
    import onnx_ir as ir

    from trivium.backends.xla.lowering import lower

    tensors = lower(model).weights
    weights.write(tensors, folder / WEIGHTS)
    stored = weights.read(folder / WEIGHTS)
    place = {id(tensor): stored[name] for name, tensor in tensors.items()}
    kept: dict[ir.Value, ir.TensorProtocol] = {}
    try:
        for graph in model.graphs():
            for value in graph.initializers.values():
                tensor = value.const_value
                if tensor is not None and id(tensor) in place:
                    kept[value] = tensor
                    value.const_value = place[id(tensor)]
        ir.save(model, folder / name)
    finally:
        for value, tensor in kept.items():
            value.const_value = tensor


def _memory(result: Mapping[str, Any], device: platforms.Device) -> dict[str, float | None]:
    """The worst program's memory, from the compiler's own analysis."""
    programs = result["programs"].values()
    each = max(sum(one["memory"].values()) for one in programs)
    return {
        "weights_bytes": max(one["weights_bytes"] for one in programs),
        "per_device_bytes": each,
        "peak_bytes": each * result["devices"] / device.chips,
    }


def _notes(
    result: Mapping[str, Any],
    device: platforms.Device,
    precision: str,
    symbolic: Mapping[str, int],
) -> tuple[str, ...]:
    """What a reader of the manifest should know: how a slice is used, what a CPU cannot show."""
    notes = [one["partition"]["note"] for one in result["programs"].values()]
    on_floats = any(one["quantized_products"] == "float" for one in result["programs"].values())
    if on_floats and device.platform == "cuda":
        notes.append(
            "quantized products are computed on floats: XLA has no convolution of integers for "
            "this GPU"
        )
    sizes = ", ".join(f"{name}={size}" for name, size in symbolic.items())
    if sizes:
        notes.append(f"memory and main.hlo.txt are those of {sizes}, which stays symbolic")
    if precision != "highest" and device.platform in _ROUNDS_TO:
        notes.append(
            f"with precision={precision} the device may round the factors of float32 products to "
            f"{_ROUNDS_TO[device.platform]}; a run on the CPU does not"
        )
    return tuple(dict.fromkeys(note for note in notes if note))


_ROUNDS_TO = {"tpu": "bfloat16", "cuda": "TF32"}

BACKEND = XlaBackend()
