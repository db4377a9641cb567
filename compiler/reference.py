"""The run that everything is compared with: ONNX Runtime on the CPU with its graph optimizations
off, or, for what it cannot run, onnx's own reference evaluator.

onnxruntime is a core dependency, so this is available wherever Trivium is. It has nothing to do
with the backend of the same name, which is held to this run like every other.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trivium.compiler.errors import BackendFailed
from trivium.compiler.onnx_api import one_line

if TYPE_CHECKING:
    import onnx_ir as ir

RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial",
     "Bernoulli"}
)  # fmt: skip

LARGE_BYTES = 256 << 20
"""Weights of more than this are never in memory together for a reference run."""


@dataclass(frozen=True)
class Reference:
    """Outputs of the reference run, and what ran it."""

    outputs: tuple[Mapping[str, Any], ...]
    engine: str


def run_file(
    path: Path, feeds: Sequence[Mapping[str, Any]], *, frugal: bool = False, fused: bool = False
) -> Reference:
    """Run an ``.onnx`` file on every feed.

    Args:
        frugal: With less memory rather than less time.
        fused: As an engine would, quantized operators by kernels of integers, not literally.

    Raises:
        BackendFailed: Neither engine can run it; the message holds both reasons.
    """
    try:
        return _run_onnxruntime(path, feeds, frugal=frugal, fused=fused)
    except Exception as error:  # onnxruntime raises a dozen kinds without a common base
        first = one_line(error)
    try:
        return _run_evaluator(path, feeds)
    except Exception as error:
        second = f"{type(error).__name__}: {one_line(error)}"
    raise BackendFailed(
        f"no reference run is possible: ONNX Runtime says {first!r}, "
        f"the reference evaluator {second!r}"
    )


def run_model(
    model: ir.Model,
    feeds: Sequence[Mapping[str, Any]],
    *,
    frugal: bool = False,
    fused: bool = False,
) -> Reference:
    """Run a model that is in memory, as `run_file`; its weights go through a temporary file.

    One that `is_large` runs piece by piece: the memory then holds a piece, and never the model.
    """
    from trivium.compiler import pieces
    from trivium.compiler.model import save

    if is_large(model):
        run = partial(_run_onnxruntime, frugal=True)
        try:
            outputs, count = pieces.run(model, feeds, lambda path, some: run(path, some).outputs)
        except Exception as error:  # as above
            raise BackendFailed(f"no reference run is possible: {one_line(error)}") from error
        bound = f"{count} pieces of up to {pieces.MOST_BYTES >> 20} MiB of weights"
        return Reference(tuple(outputs), f"onnxruntime {_version()}, in {bound}")
    with tempfile.TemporaryDirectory(prefix="trivium-") as folder:
        path = Path(folder) / "model.onnx"
        save(model, path)
        return run_file(path, feeds, frugal=frugal, fused=fused)


def is_large(model: ir.Model) -> bool:
    """Whether a model's weights are too many to be in memory together, and it can be cut."""
    from trivium.compiler import pieces

    return pieces.can_be_cut(model) and pieces.weights_bytes(model) > LARGE_BYTES


def _run_onnxruntime(
    path: Path, feeds: Sequence[Mapping[str, Any]], *, frugal: bool = False, fused: bool = False
) -> Reference:
    import onnxruntime as ort

    options = ort.SessionOptions()
    if not fused:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    if frugal:
        options.enable_cpu_mem_arena = False
        options.add_session_config_entry("session.disable_prepacking", "1")
    # Of a quantized product and its bias it would make a Gemm of floats.
    without = ["MatMulAddFusion"] if fused else []
    session = ort.InferenceSession(
        path, options, providers=["CPUExecutionProvider"], disabled_optimizers=without
    )
    names = [output.name for output in session.get_outputs()]
    outputs = tuple(dict(zip(names, session.run(names, dict(f)), strict=True)) for f in feeds)
    return Reference(outputs, f"onnxruntime {_version()}")


def _version() -> str:
    import onnxruntime as ort

    return str(ort.__version__)


def _run_evaluator(path: Path, feeds: Sequence[Mapping[str, Any]]) -> Reference:
    import onnx
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(str(path))
    names = evaluator.output_names
    outputs = tuple(dict(zip(names, evaluator.run(None, dict(f)), strict=True)) for f in feeds)
    return Reference(outputs, f"onnx reference evaluator {onnx.__version__}")


def draws_random_numbers(model: ir.Model) -> bool:
    """Whether two runs of the model may rightly differ."""
    return any(node.op_type in RANDOM and node.domain == "" for node in model.graph.all_nodes())
