"""The FPGA backend: a quantized model becomes a Vitis HLS project, simulated here with g++.

The model is lowered to integers (`lower`), folded to the device (`cost.fold`), emitted (one of
`EMITTERS`). Floats end at the kernel's edge: the host quantizes what goes in and dequantizes what
comes out (`host_ops`), and computes a Softmax over the classes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from trivium.backends.fpga import cost, host_ops, interpret, lower
from trivium.backends.fpga import folding as folds
from trivium.backends.fpga.hls import project, simulate
from trivium.compiler import model as models
from trivium.compiler.artifact import Artifact
from trivium.compiler.backend import BuildRequest, Executable, Tensors
from trivium.compiler.errors import Unsupported
from trivium.compiler.options import Amount, Option, values_of
from trivium.compiler.passing import Pass
from trivium.compiler.samples import conform_feeds
from trivium.compiler.types import (
    Built,
    Estimate,
    Preserves,
    Program,
    Target,
    TensorInfo,
    Workload,
)

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from trivium.backends.fpga.ir import Dataflow

    Array = np.ndarray[Any, Any]

Emitter = Callable[..., list[str]]

EMITTERS: Mapping[str, Emitter] = {"vitis": project.write}
"""Tool flow of a target -> what writes a project for it."""


@dataclass(frozen=True)
class ForgetLowering(Pass):
    """Make the backend lower the model anew: a pass before this one may have changed it."""

    name: ClassVar[str] = "fpga-forget-lowering"
    preserves: ClassVar[Preserves] = "exact"

    def run(self, model: ir.Model) -> bool:
        lower.forget(model.graph)
        return False


def flow_of(target: Target) -> str:
    """The name of a target's tool flow."""
    named = target.options.get("flow")
    if named is not None:
        return named
    return "vitis" if target.options.get("part", "").startswith("xc") else "none"


def no_emitter(target: Target) -> str | None:
    """Why nothing can be emitted for a target, or None."""
    flow = flow_of(target)
    if flow not in EMITTERS:
        return f"{target.name} needs the RTL emitter, which is not written yet"
    if "part" not in target.options:
        return f"{target.name} states no part number"
    return None


class FpgaBackend:
    """Vitis HLS for AMD devices."""

    name = "fpga"
    options = (Option("interval_us", Amount("microseconds"), "between frames, to unroll for"),)

    def available(self) -> str | None:
        return None

    def toolchain(self) -> dict[str, str]:
        return {"emitter": "vitis-hls"}

    def legalize(self, target: Target) -> Sequence[ir.passes.PassBase]:
        return (ForgetLowering(),)

    def refuses(self, node: ir.Node, target: Target) -> str | None:
        missing = no_emitter(target)
        if missing is not None:
            return missing
        if node.graph is None or not isinstance(node.graph, _graph_type()):
            return "it lies in a subgraph or function"
        return lower.lowered(node.graph).refusals.get(node)

    def estimate(self, model: ir.Model, target: Target, workload: Workload) -> Estimate:
        flow = _flow(model, target)
        return cost.estimate(flow, cost.fold(flow, target), target, _frames(model))

    def build(self, model: ir.Model, request: BuildRequest) -> Built:
        import numpy as np

        target = request.target
        chosen = values_of(self, request.options)
        flow = _flow(model, target)
        folding = cost.fold(flow, target, chosen["interval_us"])
        folds.check(flow, folding)
        estimate = cost.estimate(flow, folding, target)
        golden = [_golden(flow, sample) for sample in request.samples] or [_zeros(flow)]
        written = EMITTERS[flow_of(target)](request.folder, flow, folding, target, estimate, golden)
        inputs, outputs = models.signature(model)
        weights = estimate.bytes_peak or 0.0
        details = {
            "ports": project.ports(flow),
            "interval_cycles": folds.interval(flow, folding),
            "latency_cycles": cost.latency(flow, folding),
            "clock_hz": cost.clock(target),
            "folding": {name: asdict(fold) for name, fold in folding.items()},
            "resources": dict(estimate.resources),
            "accumulator_bits": {
                layer.name: layer.accumulator.bits
                for layer in flow.layers
                if hasattr(layer, "accumulator")
            },
            "golden_frames": int(np.sum([1 for _ in golden])),
            "files": written,
        }
        return Built(
            programs=(Program("main", "hls/kernel.cpp", inputs, outputs),),
            weights="hls/weights.h",
            memory={"weights_bytes": weights, "peak_bytes": weights, "per_device_bytes": weights},
            details=details,
            notes=(
                "no Vitis tool, synthesis or board was run: what the verification compares is the "
                "C++ kernel, simulated with g++",
                *estimate.notes,
            ),
        )

    def load(self, artifact: Artifact) -> Executable:
        return SimulatedKernel(artifact)


def _graph_type() -> type:
    import onnx_ir as ir

    return ir.Graph


def _frames(model: ir.Model) -> int:
    """Frames in one call: the batch of the model's first input."""
    shape = model.graph.inputs[0].shape if model.graph.inputs else None
    first = shape[0] if shape is not None and len(shape) else 1
    return first if isinstance(first, int) else 1


def _flow(model: ir.Model, target: Target) -> Dataflow:
    """The lowered model; raises ``Unsupported`` with every refusal."""
    missing = no_emitter(target)
    if missing is not None:
        raise Unsupported(missing, about=target.name, refusals=[missing])
    done = lower.lowered(model.graph)
    if done.flow is None:
        refusals = [
            f"{node.name or node.op_type} ({node.op_type}): {reason}"
            for node, reason in done.refusals.items()
        ]
        raise Unsupported(
            f"fpga cannot run {len(refusals)} nodes: {'; '.join(refusals[:8])}",
            about=target.name,
            remedy="quantize the model with --recipe int8",
            refusals=refusals,
        )
    return done.flow


def _golden(flow: Dataflow, sample: Tensors) -> tuple[dict[str, Array], dict[str, Array]]:
    """The integers of one sample's first frame: what goes into the kernel, what must come out."""
    described = project.ports(flow)
    given = {
        port["name"]: host_ops.prepare(port, sample[port["name"]])[0]
        for port in described["inputs"]
    }
    return given, _outputs(flow, given)


def _zeros(flow: Dataflow) -> tuple[dict[str, Array], dict[str, Array]]:
    import numpy as np

    given = {
        port.name: np.full(flow.tensors[port.tensor].shape, flow.tensors[port.tensor].range.lo)
        for port in flow.inputs
    }
    return given, _outputs(flow, given)


def _outputs(flow: Dataflow, given: Mapping[str, Array]) -> dict[str, Array]:
    values = interpret.run(flow, {port.tensor: given[port.name] for port in flow.inputs})
    return {port.name: values[port.tensor] for port in flow.outputs}


class SimulatedKernel:
    """The emitted C++, compiled with g++, behind the host's part in numpy."""

    where = "g++ simulation of the HLS kernel"
    measures_target = False

    def __init__(self, artifact: Artifact) -> None:
        program = artifact.programs[0]
        self.inputs: Sequence[TensorInfo] = program.inputs
        self._ports = json.loads((artifact.path / project.PORTS).read_text(encoding="utf-8"))
        self._program: Path = simulate.compile_bench(artifact.path)
        simulate.check_golden(self._program, artifact.path)

    def run(self, feeds: Tensors) -> dict[str, Array]:
        ready = conform_feeds(feeds, self.inputs)
        streams = [host_ops.prepare(port, ready[port["name"]]) for port in self._ports["inputs"]]
        shapes = [port["image"] for port in self._ports["outputs"]]
        sizes = [height * width * channels for height, width, channels in shapes]
        memory = [port["memory"] for port in self._ports["outputs"]]
        raw = simulate.run(self._program, streams, list(zip(memory, sizes, strict=True)))
        return {
            port["name"]: host_ops.finish(port, array.reshape(len(array), *port["image"]))
            for port, array in zip(self._ports["outputs"], raw, strict=True)
        }


BACKEND = FpgaBackend()
