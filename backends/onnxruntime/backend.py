"""The ONNX Runtime backend: writes an optimized ``.onnx`` and runs it on this CPU."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trivium.backends.onnxruntime import generating, huge_pages
from trivium.backends.onnxruntime.ragged import RaggedDecoder
from trivium.compiler.artifact import Artifact
from trivium.compiler.backend import BuildRequest, Executable, Tensors
from trivium.compiler.errors import BackendFailed, BadInput
from trivium.compiler.generation.executable import GeneratorExecutable, is_driven
from trivium.compiler.onnx_api import one_line
from trivium.compiler.options import OneOf, Option, values_of
from trivium.compiler.samples import conform_feeds
from trivium.compiler.types import Built, Estimate, Program, Target, TensorInfo, Workload

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from trivium.compiler.cost import Profile
    from trivium.compiler.generator import Generator


class OnnxRuntimeBackend:
    """ONNX Runtime's CPU execution provider."""

    name = "onnxruntime"
    cache_form = "growing"
    options = (
        Option("kv_cache", OneOf(("f32", "int8")), "what a generator's keys and values are held "
               "in", "f32"),
    )  # fmt: skip

    def available(self) -> str | None:
        return None

    def toolchain(self) -> dict[str, str]:
        from importlib.metadata import version

        return {"onnxruntime": version("onnxruntime")}

    def legalize(self, target: Target) -> Sequence[ir.passes.PassBase]:
        # Otherwise normal form is what it runs best: Attention, RotaryEmbedding, RMSNormalization
        # and Gelu have CPU kernels that were measured to be no slower than their expansions, and
        # Q/DQ is what its own fusions look for, except where they would copy all weights.
        from trivium.backends.onnxruntime.blocked_products import PackBlockedProducts
        from trivium.backends.onnxruntime.fused_operators import FuseResidualNorm, FuseSwish
        from trivium.passes.remove_dead_code import RemoveDeadCode
        from trivium.passes.widen_attention_mask import WidenAttentionMask

        return (
            WidenAttentionMask(),
            PackBlockedProducts(),
            FuseSwish(),
            FuseResidualNorm(),
            RemoveDeadCode(),
        )

    def refuses(self, node: ir.Node, target: Target) -> str | None:
        from trivium.backends.onnxruntime.kernels import refusal

        return refusal(node)

    def estimate(self, model: ir.Model, target: Target, workload: Workload) -> Estimate:
        from trivium.backends.onnxruntime import cost

        return cost.estimate(model, target, workload)

    def profile(self, target: Target) -> Profile:
        from trivium.backends.onnxruntime import cost

        return cost.profile_for(target)

    def build(self, model: ir.Model, request: BuildRequest) -> Built:
        # Imported here: what loads an artifact needs no onnx.
        import onnx_ir as ir

        from trivium.backends.onnxruntime import genai
        from trivium.backends.onnxruntime.shared_cache import share_caches
        from trivium.compiler import model as models

        held = values_of(self, request.options)["kv_cache"]
        inputs, outputs = models.signature(model)
        generator = request.generator
        if generator is not None:
            generating.default_to_last(model, generator)
            # Caches that the source has among its inputs stay as it has them.
            if not any(cache.past in f for cache in generator.caches for f in request.samples):
                generator = share_caches(model, generator)
            inputs, outputs = models.signature(model)
        # ONNX Runtime does without; whoever else reads the file asks what its operators are of.
        for node in model.graph.all_nodes():
            model.opset_imports.setdefault(node.domain, 1)
        # A generator's weights are read by two graphs, and so are never inside of one.
        external = True if generator is not None else None
        files = models.save(model, request.folder / "model.onnx", external=external)
        notes = []
        if held != "f32":
            generator = _with_small_caches(files[0], request, generator)
            inputs, outputs = models.signature(ir.load(files[0]))
        if generator is not None:
            problem = genai.write(request.folder, files[0].name, generator)
            notes += [f"no genai_config.json: {problem}"] if problem else []
        without = _unwanted_fusions(model)
        _session(str(files[0]), without)
        return Built(
            programs=(Program("main", "model.onnx", inputs, outputs),),
            weights=files[1].name if len(files) > 1 else None,
            details={"disabled_optimizers": without, "pairs": _rounds_in_pairs(model)},
            notes=tuple(notes),
            generator=generator,
        )

    def load(self, artifact: Artifact) -> Executable:
        generator = artifact.generator
        if generator is None:
            return OnnxRuntimeExecutable(artifact)
        with huge_pages.heap(_room_for_weights(artifact)):
            executable = OnnxRuntimeExecutable(artifact)
        session, where = executable.session, executable.where
        decoder: RaggedDecoder | generating.OnnxRuntimeDecoder
        if generator.form == "ragged":
            pairs = bool(artifact.manifest["details"].get("pairs"))
            decoder = RaggedDecoder(generator, session, where, pairs)
        else:
            decoder = generating.OnnxRuntimeDecoder(generator, session, where)
        plain = None if is_driven(generator, artifact.inputs) else executable.run
        return GeneratorExecutable(artifact.inputs, decoder, executable.measures_target, plain)


def _with_small_caches(file: Path, request: BuildRequest, generator: Generator | None) -> Generator:
    """Hold the caches of a graph that was saved in int8, by what the samples put into them.

    Raises:
        BadInput: It has no caches, or not the kind that can be held so.
    """
    from trivium.backends.onnxruntime import quantized_caches
    from trivium.compiler.generation.compiling import rows_of

    if generator is None or generator.form != "ragged":
        raise BadInput(
            "only caches whose rows have ends of their own can be held in int8",
            about="--option kv_cache",
            remedy="leave it out",
        )
    decoder = RaggedDecoder(generator, _session(str(file), ()), "")
    rows = [row for feed in request.samples for row in rows_of(generator, feed) if row]
    if not rows:
        raise BadInput(
            "there are no samples to measure keys and values by",
            about="--option kv_cache",
            remedy="give some with --calib",
        )
    return quantized_caches.quantize(file, generator, decoder, rows)


def _room_for_weights(artifact: Artifact) -> int:
    """Bytes that a session may ask for: weights packed anew, in pieces that double each time."""
    weights = artifact.manifest.get("weights")
    return 2 * (artifact.path / weights).stat().st_size if weights else 0


def _unwanted_fusions(model: ir.Model) -> list[str]:
    """The fusions of ONNX Runtime that a graph is faster, or only right, without.

    It makes a Gemm of a product and the bias added to it before it looks at what is quantized, and
    has no integer kernel for that Gemm: int8 MiniLM took 54 ms with the fusion and 14 ms without
    (one thread of a Xeon). And it takes the zero of 8-bit floats for their least
    value, and so a ReLU before them for nothing.
    """
    import onnx_ir as ir

    floats = (ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E5M2)
    kinds = {
        node.inputs[0].dtype
        for node in model.graph.all_nodes()
        if node.op_type == "DequantizeLinear" and node.inputs[0] is not None
    }
    unwanted = ["MatMulAddFusion"] if kinds else []
    return [*unwanted, "ReluQuantRewrite"] if kinds & set(floats) else unwanted


def _rounds_in_pairs(model: ir.Model) -> bool:
    """Whether a row on its own comes out otherwise than in company, visibly.

    The kernels of MatMulNBits and GroupQueryAttention add up two rows or more in another order than
    one. Rounding activations to int8, as accuracy level 4 does, turns the last digit of a float
    into one of 127 steps, and a few of those move the logits by some percent of their spread.
    """
    return any(
        node.op_type == "MatMulNBits" and node.attributes.get_int("accuracy_level", 0) == 4
        for node in model.graph.all_nodes()
    )


def _session(path: str, without: Sequence[str]) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    if threads := _threads():
        options.intra_op_num_threads = threads
    try:
        return ort.InferenceSession(
            path, options, providers=["CPUExecutionProvider"], disabled_optimizers=list(without)
        )
    except Exception as error:  # onnxruntime raises a dozen kinds without a common base
        raise BackendFailed(one_line(error), about="onnxruntime") from error


def _version() -> str:
    import onnxruntime as ort

    return str(ort.__version__)


def _threads() -> int:
    """How many threads to ask for; 0 leaves it to ONNX Runtime.

    It starts one for each core of the machine, also where this process is kept to fewer, and the
    ones in excess spin against those that compute.
    """
    if not hasattr(os, "sched_getaffinity"):
        return 0
    allowed = len(os.sched_getaffinity(0))
    return allowed if allowed < (os.cpu_count() or 1) else 0


class OnnxRuntimeExecutable:
    """A session over an artifact's model."""

    measures_target = True

    def __init__(self, artifact: Artifact) -> None:
        program = artifact.programs[0]
        self.inputs: Sequence[TensorInfo] = program.inputs
        without = artifact.manifest["details"].get("disabled_optimizers", ())
        self.session = _session(str(artifact.path / program.file), without)
        self._outputs = [info.name for info in program.outputs]
        self.where = f"ONNX Runtime {_version()} on this CPU"

    def run(self, feeds: Tensors) -> dict[str, np.ndarray[Any, Any]]:
        ready = conform_feeds(feeds, self.inputs)
        try:
            results = self.session.run(self._outputs, ready)
        except Exception as error:  # as above
            raise BackendFailed(one_line(error), about="onnxruntime") from error
        return dict(zip(self._outputs, results, strict=True))


BACKEND = OnnxRuntimeBackend()
