"""What the tests of passes share: models from ONNX's text form, and running them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx.parser
import onnx_ir as ir

from tests.property.graphs import run
from trivium.compiler.passing import Declined, Pass, declining
from trivium.passes.infer_shapes import InferShapes
from trivium.passes.lift_constants import LiftConstants
from trivium.passes.remove_dead_code import RemoveDeadCode

HEADER = '<ir_version: 10, opset_import: ["" : 24]>'


def model(text: str, /, **weights: Any) -> ir.Model:
    """Read ``g (inputs) => (outputs) { body }`` in the form that passes meet: constants lifted.

    Inputs named in ``weights`` become initializers.
    """
    made = ir.from_proto(onnx.parser.parse_model(f"{HEADER} g {text}"))
    for name, array in weights.items():
        value = next(value for value in made.graph.inputs if value.name == name)
        made.graph.inputs.remove(value)
        value.const_value = ir.tensor(np.asarray(array), name=name)
        made.graph.register_initializer(value)
    return infer(made)


def infer(made: ir.Model) -> ir.Model:
    """Lift constants, type and shape every value: passes rely on it."""
    LiftConstants()(made)
    InferShapes()(made)
    return made


def ops(made: ir.Model) -> Counter[str]:
    """How many nodes there are of each operator, bodies included."""
    return Counter(node.op_type for node in made.graph.all_nodes())


def feed(made: ir.Model, seed: int = 0, dim: int = 3) -> dict[str, Any]:
    """Standard normal inputs; symbolic dimensions become ``dim``."""
    rng = np.random.default_rng(seed)
    return {
        value.name or "": rng.standard_normal(
            [size if isinstance(size, int) else dim for size in value.shape or ()]
        ).astype(np.float32)
        for value in made.graph.inputs
    }


def check(one: Pass, made: ir.Model, *, tolerance: float = 1e-5) -> Counter[str]:
    """Run a pass that has to change the model and keep its outputs; return what is left alive."""
    inputs = feed(made)
    expected = run(made, inputs)
    assert one(made).modified
    for want, have in zip(expected, run(made, inputs), strict=True):
        np.testing.assert_allclose(have, want, rtol=tolerance, atol=tolerance)
    assert not one(made).modified
    RemoveDeadCode()(made)
    return ops(made)


def declined(one: Pass, made: ir.Model) -> list[Declined]:
    """Run a pass that has to leave the model alone; return what it says."""
    before = ir.to_proto(made).SerializeToString(deterministic=True)
    with declining() as notes:
        assert not one(made).modified
    assert ir.to_proto(made).SerializeToString(deterministic=True) == before
    return list(notes)
