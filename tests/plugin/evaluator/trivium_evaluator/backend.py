"""onnx's reference evaluator as a backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trivium.compiler import model as models
from trivium.compiler.artifact import Artifact
from trivium.compiler.backend import BuildRequest, Executable, Tensors
from trivium.compiler.types import Built, Estimate, Program, Target, TensorInfo, Workload

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir


class EvaluatorBackend:
    """Runs anything that ONNX defines, slowly."""

    name = "evaluator"

    def available(self) -> str | None:
        return None

    def toolchain(self) -> dict[str, str]:
        from importlib.metadata import version

        return {"onnx": version("onnx")}

    def legalize(self, target: Target) -> Sequence[ir.passes.PassBase]:
        return ()

    def refuses(self, node: ir.Node, target: Target) -> str | None:
        return None if node.domain == "" else f"the evaluator knows no domain {node.domain!r}"

    def estimate(self, model: ir.Model, target: Target, workload: Workload) -> Estimate:
        return Estimate(None, notes=("nobody has timed an abacus",))

    def build(self, model: ir.Model, request: BuildRequest) -> Built:
        models.save(model, request.folder / "model.onnx", external=False)
        inputs, outputs = models.signature(model)
        return Built(programs=(Program("main", "model.onnx", inputs, outputs),))

    def load(self, artifact: Artifact) -> Executable:
        return Evaluator(artifact)


class Evaluator:
    """A loaded artifact."""

    where = "onnx's reference evaluator"
    measures_target = True

    def __init__(self, artifact: Artifact) -> None:
        from onnx.reference import ReferenceEvaluator

        program = artifact.programs[0]
        self.inputs: Sequence[TensorInfo] = program.inputs
        self._evaluator = ReferenceEvaluator(str(artifact.path / program.file))

    def run(self, feeds: Tensors) -> dict[str, np.ndarray[Any, Any]]:
        names = self._evaluator.output_names
        return dict(zip(names, self._evaluator.run(None, dict(feeds)), strict=True))


BACKEND = EvaluatorBackend()
