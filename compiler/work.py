"""What an operator asks of a machine: operations by dtype, and bytes read, written and held.

One table maps every operator to a formula; the formulas live in `trivium.compiler.formulas`, one
file for each group of operators. They see shapes and attributes, never the content of a weight.

What is counted: one multiply-accumulate is two operations; comparisons, conversions and the like
are one; a transcendental is `TRANSCENDENTAL`. *Dense* operations are those that matrix units do
(products of matrices, convolutions, attention); the rest is *vector* work. An operator that only
renames its input (Reshape, Squeeze) moves no bytes; one that picks (Gather, Slice) reads what it
picks. All sums are for one call, as if every operator ran alone: what fusion saves is for the cost
model to say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import onnx_ir as ir

from trivium.compiler.errors import BadInput, Unsupported
from trivium.compiler.passing import attribute, constant, is_op
from trivium.compiler.types import Work

if TYPE_CHECKING:
    import numpy as np

TRANSCENDENTAL = 10
"""Operations of one exp, log, tanh, ...: about what a polynomial to float32 precision takes."""

MICROSOFT = "com.microsoft"

_PEAK_NAMES = {
    "FLOAT": "float32",
    "DOUBLE": "float64",
    "UINT8": "int8",
    "UINT4": "int4",
    "FLOAT4E2M1": "float4",
}


def dtype_name(dtype: ir.DataType | None) -> str:
    """The name under which `Target.peak_ops` lists the rate of a dtype."""
    if dtype is None:
        return "unknown"
    if dtype.name.startswith("FLOAT8"):
        return "float8"
    return _PEAK_NAMES.get(dtype.name, dtype.name.lower())


class Product(NamedTuple):
    """``batch`` products of [m, k] and [k, n]: what a convolution comes down to as well.

    Attributes:
        row: Elements of the result that lie side by side, as does what they are made from: ``n``
            of a product, the width of a convolution's picture (1 where it skips); 0 is unknown.
        taps: Places in a convolution's window: ``k`` is that many runs of channels.
    """

    m: float
    n: float
    k: float
    batch: float = 1.0
    row: float = 0.0
    taps: float = 1.0

    @property
    def operations(self) -> float:
        return 2.0 * self.m * self.n * self.k * self.batch


class AttentionSize(NamedTuple):
    """One attention; ``queries`` is 1 when a token is decoded against a cache of ``keys``."""

    batch: float
    heads: float
    kv_heads: float
    queries: float
    keys: float
    head: float
    causal: bool = False


@dataclass(frozen=True)
class Demand:
    """What one run of an operator asks for.

    Attributes:
        dense: Operations that matrix units can do.
        vector: The other operations.
        reads, writes: Bytes by index of input and output, where they differ from the whole value.
        dtype: Of the dense operations, where it is not that of the inputs.
        product, attention: The sizes of the dense operations, where they are those of one.
    """

    dense: float = 0.0
    vector: float = 0.0
    reads: Mapping[int, float] = field(default_factory=dict)
    writes: Mapping[int, float] = field(default_factory=dict)
    dtype: str | None = None
    product: Product | None = None
    attention: AttentionSize | None = None


class Site:
    """A node as formulas see it: static shapes, dtypes, attributes, small constants."""

    def __init__(self, node: ir.Node) -> None:
        self.node = node

    def has(self, index: int) -> bool:
        """Whether an optional input is given."""
        return index < len(self.node.inputs) and self.node.inputs[index] is not None

    def shape(self, index: int = 0) -> tuple[int, ...]:
        """Shape of an input; ``()`` for a sequence. Raises ``BadInput`` if it is not static."""
        return static_shape(self.node.inputs[index]) if self.has(index) else ()

    def out_shape(self, index: int = 0) -> tuple[int, ...]:
        """Shape of an output, likewise."""
        return static_shape(self.node.outputs[index])

    def count(self, index: int = 0) -> int:
        """Elements of an input; 0 if it is absent."""
        return math.prod(self.shape(index)) if self.has(index) else 0

    def out_count(self, index: int = 0) -> int:
        """Elements of an output."""
        return math.prod(self.out_shape(index))

    def bytes(self, index: int = 0) -> float:
        """Bytes of an input; 0 if it is absent."""
        return value_bytes(self.node.inputs[index]) if self.has(index) else 0.0

    def out_bytes(self, index: int = 0) -> float:
        """Bytes of an output."""
        return value_bytes(self.node.outputs[index])

    def attr(self, name: str, default: Any = None) -> Any:
        """An attribute's value."""
        return attribute(self.node, name, default)

    def constant(self, index: int) -> np.ndarray[Any, Any] | None:
        """A small constant input."""
        return constant(self.node.inputs[index]) if self.has(index) else None

    @cached_property
    def dtype(self) -> str:
        """The dtype of the arithmetic: of the first floating-point value, else of the first."""
        values = [v for v in (*self.node.inputs, *self.node.outputs) if v is not None and v.dtype]
        floats = (v for v in values if v.dtype is not None and v.dtype.is_floating_point())
        first = next(floats, values[0] if values else None)
        return dtype_name(first.dtype) if first is not None else "unknown"

    def operand_dtype(self, *indices: int) -> str:
        """The dtype in which a product of inputs can be done.

        When all of them come out of DequantizeLinear with the same kind of integer (or float8)
        behind, an engine can multiply those. When only the weights do, it multiplies floats.
        """
        behind = {_quantized_dtype(self.node.inputs[index]) for index in indices}
        found = behind.pop() if len(behind) == 1 else None
        return found or self.dtype


def _quantized_dtype(value: ir.Value | None) -> str | None:
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "DequantizeLinear" or node.inputs[0] is None:
        return None
    return dtype_name(node.inputs[0].dtype)


def static_shape(value: ir.Value | None) -> tuple[int, ...]:
    """The shape of a value; ``()`` for what is no tensor.

    Raises:
        BadInput: A dimension is symbolic or unknown.
    """
    if value is None or not isinstance(value.type, (ir.TensorType, type(None))):
        return ()
    if value.shape is None:
        raise BadInput(
            "its shape is unknown, so work cannot be counted",
            about=f"value {value.name!r}",
            remedy="bind the inputs with --shape, or measure where it depends on the data",
        )
    for dim in value.shape:
        if not isinstance(dim, int):
            raise BadInput(
                f"the dimension {str(dim.value or '?')!r} is symbolic, so work cannot be counted",
                about=f"value {value.name!r}",
                remedy="bind it with --shape, or measure where it depends on the data",
            )
    return tuple(int(dim) for dim in value.shape if isinstance(dim, int))


def value_bytes(value: ir.Value | None) -> float:
    """Bytes of a value; half a byte for each int4; 0 for sequences and strings (unknown)."""
    if value is None or value.dtype is None or value.dtype == ir.DataType.STRING:
        return 0.0
    return math.prod(static_shape(value)) * value.dtype.bitwidth / 8


Formula = Callable[[Site], Demand]
FORMULAS: dict[tuple[str, str], Formula] = {}
"""(domain, operator) -> formula; filled by `formula`."""

_F = TypeVar("_F", bound=Formula)


def formula(*op_types: str, domain: str = "") -> Callable[[_F], _F]:
    """Enter a formula into the table for some operators; a second one for any is an error."""

    def enter(function: _F) -> _F:
        for op_type in op_types:
            if (domain, op_type) in FORMULAS:
                raise ValueError(f"two work formulas for {domain or 'ai.onnx'}::{op_type}")
            FORMULAS[domain, op_type] = function
        return function

    return enter


def demand_of(node: ir.Node) -> Demand:
    """Evaluate the formula of a node (control flow: nothing of its own, see `bodies`).

    Raises:
        BadInput: A shape that the formula needs is not static.
        Unsupported: No formula is known.
    """
    import trivium.compiler.formulas  # noqa: F401  (fills the table)

    domain = "" if node.domain == "ai.onnx" else node.domain
    found = FORMULAS.get((domain, node.op_type))
    if found is None:
        raise Unsupported(
            f"no work formula for {domain or 'ai.onnx'}::{node.op_type}",
            about=f"node {node.name or node.op_type!r}",
            remedy="enter one with trivium.compiler.work.formula",
        )
    return found(Site(node))


def reads_of(node: ir.Node, demand: Demand) -> list[float]:
    """Bytes read from each input."""
    return [
        demand.reads[i] if i in demand.reads else value_bytes(v) for i, v in enumerate(node.inputs)
    ]


def writes_of(node: ir.Node, demand: Demand) -> list[float]:
    """Bytes written to each output."""
    return [
        demand.writes[i] if i in demand.writes else value_bytes(v)
        for i, v in enumerate(node.outputs)
    ]


def operations_of(node: ir.Node, demand: Demand) -> dict[str, float]:
    """Dense and vector operations by dtype."""
    site = Site(node)
    found: dict[str, float] = {}
    for dtype, count in ((demand.dtype or site.dtype, demand.dense), (site.dtype, demand.vector)):
        if count:
            found[dtype] = found.get(dtype, 0.0) + count
    return found


Sums = dict["ir.Graph", Work]
"""The work of bodies seen so far: nested branches would be summed anew at every level."""


def work_of(node: ir.Node, sums: Sums | None = None) -> Work:
    """The work of one node, its bodies included.

    Raises:
        BadInput: A shape is not static, or a loop runs for a number of times unknown beforehand.
        Unsupported: No formula is known.
    """
    sums = {} if sums is None else sums
    demand = demand_of(node)
    resident = sum(value_bytes(v) for v in set(node.inputs) if v is not None and is_weight(v))
    work = Work(
        operations_of(node, demand),
        sum(reads_of(node, demand)),
        sum(writes_of(node, demand)),
        resident,
    )
    for graph, times in bodies(node, sums):
        body = _sum_of(graph, sums)
        work += Work(
            {dtype: count * times for dtype, count in body.operations.items()},
            body.bytes_read * times,
            body.bytes_written * times,
            body.bytes_resident,
        )
    return work


def work_of_model(model: ir.Model) -> Work:
    """The work of one call of a model; weights that several nodes share are held once."""
    total = _sum_of(model.graph, {})
    return Work(total.operations, total.bytes_read, total.bytes_written, resident_bytes(model))


def _sum_of(graph: ir.Graph, sums: Sums) -> Work:
    if graph not in sums:
        total = Work()
        for node in graph:
            total += work_of(node, sums)
        sums[graph] = total
    return sums[graph]


def is_weight(value: ir.Value) -> bool:
    """Whether a value is stored in the model."""
    return value.is_initializer() or (
        (node := value.producer()) is not None and is_op(node, "Constant")
    )


def resident_bytes(model: ir.Model) -> float:
    """Bytes of all weights, each once; int4 at half a byte."""
    total = 0.0
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                total += value.const_value.nbytes
    return total


def bodies(node: ir.Node, sums: Sums | None = None) -> Iterator[tuple[ir.Graph, float]]:
    """The subgraphs that a node runs and how often: of an If, the branch with more work.

    Raises:
        BadInput: A Loop whose trip count is not a constant.
    """
    if is_op(node, "If"):
        branches = [node.attributes[name].as_graph() for name in ("then_branch", "else_branch")]
        sums = {} if sums is None else sums
        works = [(_sum_of(branch, sums), branch) for branch in branches]
        heavier = max(works, key=lambda pair: (pair[0].total_operations, pair[0].bytes_moved))
        yield heavier[1], 1.0
    elif is_op(node, "Loop"):
        trips = constant(node.inputs[0])
        if trips is None:
            raise BadInput(
                "how often the loop runs is not known before it does",
                about=f"node {node.name or 'Loop'!r}",
                remedy="give it a constant trip count, or measure instead",
            )
        yield node.attributes["body"].as_graph(), float(trips.reshape(()))
    elif is_op(node, "Scan"):
        yield node.attributes["body"].as_graph(), float(_scan_length(node))
    elif is_op(node, "SequenceMap"):
        raise BadInput(
            "the length of a sequence is not known before it is made",
            about=f"node {node.name or 'SequenceMap'!r}",
            remedy="measure instead",
        )


def _scan_length(node: ir.Node) -> int:
    scanned = attribute(node, "num_scan_inputs", 1)
    axes = attribute(node, "scan_input_axes") or [0] * scanned
    shape = static_shape(node.inputs[-scanned])
    return shape[int(axes[0])]
