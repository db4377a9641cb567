"""The OpenVINO backend: a model that OpenVINO compiles for this CPU when it is loaded.

It stays an ``.onnx`` file; a generator becomes OpenVINO's own format, which has variables for its
caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from trivium.compiler import model as models
from trivium.compiler.artifact import Artifact
from trivium.compiler.backend import BuildRequest, Executable, Tensors
from trivium.compiler.errors import BackendFailed, ToolchainMissing, Unsupported
from trivium.compiler.options import OneOf, Option, values_of
from trivium.compiler.samples import conform_feeds
from trivium.compiler.types import Built, Estimate, Program, Target, TensorInfo, Workload

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from trivium.compiler.cost import Profile
    from trivium.compiler.generator import Generator

FILE, OWN_FILE, OWN_WEIGHTS = "model.onnx", "model.xml", "model.bin"


class OpenVinoBackend:
    """OpenVINO's CPU plugin."""

    name = "openvino"
    cache_form = "growing"
    options = (
        Option("kv_cache", OneOf(("f32", "f16", "bf16", "u8")), "what a generator's keys and "
               "values are held in; by default what it computes in"),
    )  # fmt: skip

    def available(self) -> str | None:
        from importlib.util import find_spec

        if find_spec("openvino") is None:
            return "openvino is not installed; install it with: pip install 'trivium[openvino]'"
        return None

    def toolchain(self) -> dict[str, str]:
        from importlib.metadata import PackageNotFoundError, version

        try:
            return {"openvino": version("openvino")}
        except PackageNotFoundError:
            return {}

    def legalize(self, target: Target) -> Sequence[ir.passes.PassBase]:
        # Without the engine nothing can be asked of it: normal form is then priced as it stands.
        if self.available() is not None:
            return ()
        from trivium.backends.openvino import legalize

        return legalize.passes()

    def refuses(self, node: ir.Node, target: Target) -> str | None:
        if self.available() is not None:
            return None
        from trivium.backends.openvino import legalize

        return legalize.refusal(node)

    def estimate(self, model: ir.Model, target: Target, workload: Workload) -> Estimate:
        from trivium.backends.openvino import cost

        return cost.estimate(model, target, workload)

    def profile(self, target: Target) -> Profile:
        from trivium.backends.openvino import cost

        return cost.profile_for(target)

    def build(self, model: ir.Model, request: BuildRequest) -> Built:
        precision = precision_of(model)
        held = values_of(self, request.options)["kv_cache"] or precision
        if request.generator is not None:
            return _build_generator(model, request, request.generator, precision, held)
        files = models.save(model, request.folder / FILE)
        from trivium.backends.openvino import engine

        try:
            engine.compile_file(str(files[0]), precision)
        except Exception as error:  # openvino raises RuntimeError, and what pybind makes of others
            raise Unsupported(
                f"OpenVINO takes each node, but not the whole: {engine.reason(error)}",
                about=request.target.name,
                remedy="bind symbolic dimensions with --shape, or try --backend onnxruntime",
            ) from error
        inputs, outputs = models.signature(model)
        return Built(
            programs=(Program("main", FILE, inputs, outputs),),
            weights=files[1].name if len(files) > 1 else None,
            details={"precision": precision},
        )

    def load(self, artifact: Artifact) -> Executable:
        unavailable = self.available()
        if unavailable is not None:
            raise ToolchainMissing(unavailable, about="backend openvino")
        if artifact.generator is not None:
            from trivium.backends.openvino import generating

            return generating.load(artifact, artifact.generator)
        return OpenVinoExecutable(artifact)


def _build_generator(
    model: ir.Model, request: BuildRequest, generator: Generator, precision: str, held: str
) -> Built:
    import openvino

    from trivium.backends.openvino import engine, generating, stateful

    path = request.folder / OWN_FILE
    try:
        made = stateful.convert(model, generator)
        openvino.save_model(made, str(path), compress_to_fp16=False)
        engine.compile_file(str(path), precision, held)
    except Exception as error:  # as in build
        raise Unsupported(
            f"OpenVINO takes each node, but not the whole: {engine.reason(error)}",
            about=request.target.name,
            remedy="try --backend onnxruntime",
        ) from error
    inputs, outputs = models.signature(model)
    beams = any(stateful.BEAMS in port.get_names() for port in made.inputs)
    program = Program(
        "main",
        OWN_FILE,
        generating.program_inputs(inputs, generator, beams),
        tuple(info for info in outputs if info.name == generator.logits),
    )
    notes = () if beams else ("its attention has no form that OpenVINO fuses with the caches",)
    return Built(
        programs=(program,),
        weights=OWN_WEIGHTS,
        details={"precision": precision, "kv_cache_precision": held},
        notes=notes,
        generator=replace(generator, form="stateful"),
    )


def precision_of(model: ir.Model) -> str:
    """What the float operators of a graph compute in, as OpenVINO calls it.

    The engine has one precision for all of them; a graph that mixes float32 and a half precision
    (as the recipes ``bf16`` and ``fp16`` leave it) asks for the half one.
    """
    types = {
        value.dtype.name
        for node in model.graph.all_nodes()
        for value in node.outputs
        if value.dtype is not None
    }
    if "BFLOAT16" in types:
        return "bf16"
    return "f16" if "FLOAT16" in types else "f32"


class OpenVinoExecutable:
    """A compiled model over an artifact's file."""

    measures_target = True

    def __init__(self, artifact: Artifact) -> None:
        from trivium.backends.openvino import engine

        program = artifact.programs[0]
        self.inputs: Sequence[TensorInfo] = program.inputs
        self._outputs = [info.name for info in program.outputs]
        precision = artifact.manifest["details"]["precision"]
        try:
            compiled = engine.compile_file(str(artifact.path / program.file), precision)
            self._request = compiled.create_infer_request()
            ports = {name: i for i, port in enumerate(compiled.outputs) for name in port.names}
            self._ports = [ports[name] for name in self._outputs]
        except Exception as error:  # as in build
            raise BackendFailed(engine.reason(error), about="openvino") from error
        self.where = f"{engine.name()} on this CPU, {precision}"

    def run(self, feeds: Tensors) -> dict[str, np.ndarray[Any, Any]]:
        from trivium.backends.openvino import engine

        ready = conform_feeds(feeds, self.inputs)
        try:
            # Inputs are shared, for they live until the call ends; outputs are copied out of it.
            results = self._request.infer(ready, share_inputs=True)
        except Exception as error:  # as in build
            raise BackendFailed(engine.reason(error), about="openvino") from error
        return {n: results[i] for n, i in zip(self._outputs, self._ports, strict=True)}


BACKEND = OpenVinoBackend()
