"""Random valid graphs for property tests: what passes meet in practice, in small.

Elementwise chains, products with weights, convolutions with normalization, reshapes (some computed
from shapes), reductions, residuals, shared values and constants, constants that fold, bodies that
read outer values, and outputs in the middle of a chain.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from hypothesis import strategies as st

from trivium.compiler.model import OPSET

IR_VERSION = 10
BATCH = 2
"""What the symbolic batch is where a feed is made."""


@dataclass
class Builder:
    """A graph under construction: the values so far, with the shapes that they really have."""

    draw: Callable[[st.SearchStrategy[Any]], Any]
    rng: np.random.Generator
    graph: ir.Graph
    shapes: dict[ir.Value, tuple[int, ...]] = field(default_factory=dict)

    def constant(self, array: Any) -> ir.Value:
        name = f"c{len(self.graph.initializers)}"
        tensor = ir.tensor(np.asarray(array), name=name)
        value = ir.Value(
            name=name,
            shape=ir.Shape(tensor.shape.numpy()),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self.graph.register_initializer(value)
        return value

    def weight(self, *shape: int) -> ir.Value:
        """A stored weight; now and then one that is stored already."""
        same = [
            value
            for value in self.graph.initializers.values()
            if value.shape == list(shape) and value.dtype == ir.DataType.FLOAT
        ]
        if same and self.draw(st.booleans()):
            return same[0]
        scale = 1 / np.sqrt(max(1, np.prod(shape[1:], dtype=int)))
        return self.constant((self.rng.standard_normal(shape) * scale).astype(np.float32))

    def op(
        self, op_type: str, *inputs: ir.Value | None, outputs: int = 1, **attributes: Any
    ) -> ir.Value:
        node = ir.node(op_type, list(inputs), attributes, num_outputs=outputs)
        self.graph.append(node)
        return node.outputs[0]

    def pick(self) -> ir.Value:
        """A value made so far, most often the last."""
        values = list(self.shapes)
        return values[-1] if self.draw(st.integers(0, 3)) else self.draw(st.sampled_from(values))

    def keep(self, value: ir.Value, shape: tuple[int, ...]) -> None:
        value.type = ir.TensorType(ir.DataType.FLOAT)
        self.shapes[value] = shape


Step = Callable[[Builder, ir.Value, tuple[int, ...]], "tuple[ir.Value, tuple[int, ...]] | None"]
STEPS: list[Step] = []


def step(function: Step) -> Step:
    STEPS.append(function)
    return function


@step
def unary(b: Builder, x: ir.Value, shape: tuple[int, ...]) -> tuple[ir.Value, tuple[int, ...]]:
    kinds = ["Relu", "Tanh", "Sigmoid", "Neg", "Abs", "Identity", "HardSwish", "Erf"]
    return b.op(b.draw(st.sampled_from(kinds)), x), shape


@step
def with_constant(
    b: Builder, x: ir.Value, shape: tuple[int, ...]
) -> tuple[ir.Value, tuple[int, ...]]:
    wide = b.draw(st.booleans())
    operand = b.weight(*((shape[-1],) if shape and wide else ()))
    order = [x, operand] if b.draw(st.booleans()) else [operand, x]
    return b.op(b.draw(st.sampled_from(["Add", "Mul", "Sub"])), *order), shape


@step
def residual(
    b: Builder, x: ir.Value, shape: tuple[int, ...]
) -> tuple[ir.Value, tuple[int, ...]] | None:
    same = [value for value, other in b.shapes.items() if other == shape]
    return b.op(b.draw(st.sampled_from(["Add", "Mul"])), x, b.draw(st.sampled_from(same))), shape


@step
def matmul(
    b: Builder, x: ir.Value, shape: tuple[int, ...]
) -> tuple[ir.Value, tuple[int, ...]] | None:
    if len(shape) < 2:
        return None
    width = b.draw(st.sampled_from([2, 3, 4]))
    made = b.op("MatMul", x, b.weight(shape[-1], width))
    if b.draw(st.booleans()):
        bias = b.weight(width)
        made = b.op("Add", *([made, bias] if b.draw(st.booleans()) else [bias, made]))
    return made, (*shape[:-1], width)


@step
def gemm(
    b: Builder, x: ir.Value, shape: tuple[int, ...]
) -> tuple[ir.Value, tuple[int, ...]] | None:
    if len(shape) != 2:
        return None
    width = b.draw(st.sampled_from([2, 3, 4]))
    turned = b.draw(st.booleans())
    weight = b.weight(width, shape[1]) if turned else b.weight(shape[1], width)
    bias = [b.weight(width)] if b.draw(st.booleans()) else []
    alpha = b.draw(st.sampled_from([1.0, 0.5]))
    return b.op("Gemm", x, weight, *bias, transB=int(turned), alpha=alpha), (shape[0], width)


@step
def conv(
    b: Builder, x: ir.Value, shape: tuple[int, ...]
) -> tuple[ir.Value, tuple[int, ...]] | None:
    if len(shape) != 4:
        return None
    n, c, h, w = shape
    if b.draw(st.booleans()):
        x = b.op("Pad", x, b.constant(np.array([0, 0, 1, 0, 0, 0, 1, 2], np.int64)))
        h, w = h + 2, w + 2
    width = b.draw(st.sampled_from([1, 2, 4]))
    transposed = b.draw(st.booleans())
    weight = b.weight(*((c, width, 3, 3) if transposed else (width, c, 3, 3)))
    bias = [b.weight(width)] if b.draw(st.booleans()) else []
    kind = "ConvTranspose" if transposed else "Conv"
    made = b.op(kind, x, weight, *bias, pads=[1, 1, 1, 1])
    if b.draw(st.booleans()):
        scale, shift, mean = (b.weight(width) for _ in range(3))
        variance = b.constant(b.rng.random(width).astype(np.float32) + 0.5)
        made = b.op("BatchNormalization", made, scale, shift, mean, variance)
    elif b.draw(st.booleans()):
        made = b.op(b.draw(st.sampled_from(["Mul", "Add"])), made, b.weight(width, 1, 1))
    return made, (n, width, h, w)


@step
def transpose(b: Builder, x: ir.Value, shape: tuple[int, ...]) -> tuple[ir.Value, tuple[int, ...]]:
    # The batch stays in front, so that it may stay symbolic.
    rest = b.draw(st.permutations(range(1, len(shape))))
    perm = [0, *rest] if shape else []
    return b.op("Transpose", x, perm=perm), tuple(shape[axis] for axis in perm)


@step
def reshape(
    b: Builder, x: ir.Value, shape: tuple[int, ...]
) -> tuple[ir.Value, tuple[int, ...]] | None:
    if not shape:
        return None
    size = int(np.prod(shape[1:], dtype=int))
    choices = [(size,), (1, size)] + ([(2, size // 2)] if size % 2 == 0 else [])
    choices += [(1, 2, size // 2)] if size % 2 == 0 and size >= 4 else []
    new = b.draw(st.sampled_from(choices))
    if b.draw(st.booleans()):
        target = b.constant(np.array([-1, *new], np.int64))
    else:
        first = b.op("Gather", b.op("Shape", x), b.constant(np.array([0], np.int64)))
        target = b.op("Concat", first, b.constant(np.array(new, np.int64)), axis=0)
    return b.op("Reshape", x, target), (shape[0], *new)


@step
def no_op(
    b: Builder, x: ir.Value, shape: tuple[int, ...]
) -> tuple[ir.Value, tuple[int, ...]] | None:
    kind = b.draw(st.sampled_from(["Dropout", "Cast", "Slice", "Squeeze", "Expand", "Pad"]))
    axis = np.array([len(shape)], np.int64)
    if kind == "Dropout":
        return b.op("Dropout", x), shape
    if kind == "Cast":
        return b.op("Cast", b.op("Cast", x, to=11), to=1), shape
    if kind == "Slice" and shape:
        ends = b.constant(np.array([2**62], np.int64))
        return b.op("Slice", x, b.constant(np.array([0], np.int64)), ends), shape
    if kind == "Squeeze":
        wide = b.op("Unsqueeze", x, b.constant(axis))
        return b.op("Squeeze", wide, b.constant(axis)), shape
    if kind == "Expand":
        return b.op("Expand", x, b.constant(np.array([1], np.int64))), shape
    if kind == "Pad" and shape:
        return b.op("Pad", x, b.constant(np.zeros(2 * len(shape), np.int64))), shape
    return None


@step
def reduce(
    b: Builder, x: ir.Value, shape: tuple[int, ...]
) -> tuple[ir.Value, tuple[int, ...]] | None:
    if len(shape) < 2:
        return None
    keep = b.draw(st.booleans())
    axes = b.constant(np.array([-1], np.int64))
    made = b.op(b.draw(st.sampled_from(["ReduceMean", "ReduceMax"])), x, axes, keepdims=int(keep))
    return made, (*shape[:-1], 1) if keep else shape[:-1]


@step
def concat(
    b: Builder, x: ir.Value, shape: tuple[int, ...]
) -> tuple[ir.Value, tuple[int, ...]] | None:
    if len(shape) < 2 or shape[-1] > 8:
        return None
    return b.op("Concat", x, b.op("Neg", x), axis=-1), (*shape[:-1], 2 * shape[-1])


@step
def folds(b: Builder, x: ir.Value, shape: tuple[int, ...]) -> tuple[ir.Value, tuple[int, ...]]:
    made = b.op("Exp", b.op("Neg", b.op("Add", b.weight(), b.weight())))
    return b.op("Mul", x, made), shape


@step
def branch(b: Builder, x: ir.Value, shape: tuple[int, ...]) -> tuple[ir.Value, tuple[int, ...]]:
    maker = x.producer()
    if maker is not None and maker.op_type == "Cast":
        # ONNX Runtime drops a double Cast without looking for readers in bodies.
        x = b.op("Neg", x)
    total = b.op("ReduceSum", x, keepdims=0)
    condition = b.op("Greater", total, b.constant(np.float32(0)))
    bodies = {}
    stem = f"if{len(b.graph)}"  # names in bodies may not repeat those of the graph around them
    for name, kind in (("then_branch", "Relu"), ("else_branch", "Tanh")):
        inner = ir.node(kind, [x])
        scale = ir.node("Constant", [], {"value_float": 0.5})
        outer = ir.node("Mul", [inner.outputs[0], scale.outputs[0]])
        for index, node in enumerate((inner, scale, outer)):
            node.outputs[0].name = f"{stem}_{name}_{index}"
        outer.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        body = ir.Graph(
            [], outer.outputs, nodes=[inner, scale, outer], opset_imports={"": OPSET}, name=name
        )
        bodies[name] = body
    node = ir.node("If", [condition], bodies)
    b.graph.append(node)
    return node.outputs[0], shape


INPUT_SHAPES = [(2, 3), (2, 2, 4), (2, 1, 4, 4), (2, 2, 3, 3)]


@st.composite
def models(draw: Any, max_steps: int = 8, symbolic: bool | None = None) -> ir.Model:
    """A valid model of float32, with one or two inputs and at least one output."""
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name="random")
    builder = Builder(draw, rng, graph)
    if symbolic is None:
        symbolic = draw(st.booleans())
    for index in range(draw(st.integers(1, 2))):
        shape = draw(st.sampled_from(INPUT_SHAPES))
        value = ir.Value(
            name=f"x{index}",
            shape=ir.Shape(["batch", *shape[1:]] if symbolic else shape),
            type=ir.TensorType(ir.DataType.FLOAT),
        )
        graph.inputs.append(value)
        builder.shapes[value] = shape
    for _ in range(draw(st.integers(1, max_steps))):
        source = builder.pick()
        made = draw(st.sampled_from(STEPS))(builder, source, builder.shapes[source])
        if made is not None:
            builder.keep(*made)
    computed = [v for v in builder.shapes if v.producer() is not None]
    if not computed:
        source = graph.inputs[0]
        builder.keep(builder.op("Relu", source), builder.shapes[source])
        computed = list(builder.shapes)[-1:]
    middle = [value for value in computed[:-1] if draw(st.integers(0, 3)) == 0]
    for index, value in enumerate([*middle, computed[-1]]):
        value.name = f"y{index}"
        shape = builder.shapes[value]
        lead = "batch" if symbolic and shape else None
        value.shape = ir.Shape([lead, *shape[1:]] if lead else shape)
        graph.outputs.append(value)
    return ir.Model(graph, ir_version=IR_VERSION)


def feeds(model: ir.Model, seed: int = 0) -> dict[str, Any]:
    """Inputs for a model of `models`."""
    rng = np.random.default_rng(seed)
    return {
        value.name or "": rng.standard_normal(
            [dim if isinstance(dim, int) else BATCH for dim in value.shape or ()]
        ).astype(np.float32)
        for value in model.graph.inputs
    }


def run(model: ir.Model, feed: dict[str, Any]) -> list[Any]:
    """Run a model on ONNX Runtime with its own optimizations off."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    data = ir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return list(session.run(None, feed))


def serialized(model: ir.Model) -> bytes:
    """A model's bytes, equal for equal models."""
    return bytes(ir.to_proto(model).SerializeToString(deterministic=True))
