"""What every pass needs: the base class, options read from its fields, and the few graph edits
that hide the traps of onnx_ir.

The traps: ``Value.uses()`` leaves out graph outputs, so fusing past one is a real bug
(`read_once`); ``Node.graph``, ``Value.shape`` and ``Value.dtype`` are Optional (`dims`); the name,
type and shape of a replaced output must move to its replacement (`splice`); an
``ExternalTensor`` cannot be released while a numpy view of it lives (`constant` copies what is
small and never maps what is large unless asked; `weight` reads what is large).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar, runtime_checkable

import onnx_ir as ir

from trivium.compiler.types import Preserves

if TYPE_CHECKING:
    import numpy as np

_SMALL_BYTES = 1 << 20

Entry = TypeVar("Entry")

# What these libraries log while a pass of theirs runs is for their own developers. Without a
# handler Python would print it; an application that configures logging still gets it.
for _library in ("onnx_ir", "onnxscript"):
    logging.getLogger(_library).addHandler(logging.NullHandler())


@runtime_checkable
class InPieces(Protocol):
    """A tensor of which a part can be read without reading, or converting, all of it."""

    def pieces(self, size: int) -> Iterator[bytes]:
        """Return the content in pieces of about ``size`` bytes, each read when it is asked for."""


class Striped(Protocol):
    """A matrix that lies in a file row by row, or column by column.

    Attributes:
        lies_along: 0 if the file holds one row after another, 1 if one column after another.
    """

    lies_along: int

    def stripe(self, start: int, stop: int) -> np.ndarray[Any, Any]:
        """Read some rows (or columns, each as a row of the result) as float32."""


def stripes_of(tensor: ir.TensorProtocol) -> Striped:
    """A stored matrix in stripes; what lies in no file is evaluated once."""
    made = getattr(tensor, "stripes", None)
    if made is not None:
        return made()  # type: ignore[no-any-return]  # those of models.safetensors
    if isinstance(tensor, ir.ExternalTensor) and tensor.dtype == ir.DataType.FLOAT:
        return _FileStripes(tensor)
    return _ArrayStripes(tensor)


class _FileStripes:
    lies_along = 0

    def __init__(self, tensor: ir.ExternalTensor) -> None:
        self._tensor = tensor
        self._columns = int(tensor.shape.numpy()[1])

    def stripe(self, start: int, stop: int) -> np.ndarray[Any, Any]:
        import numpy as np

        offset = (self._tensor.offset or 0) + 4 * start * self._columns
        count = (stop - start) * self._columns
        stored = np.fromfile(self._tensor.path, "<f4", count=count, offset=offset)
        return stored.reshape(stop - start, self._columns)


class _ArrayStripes:
    lies_along = 0

    def __init__(self, tensor: ir.TensorProtocol) -> None:
        self._array = _read(tensor)

    def stripe(self, start: int, stop: int) -> np.ndarray[Any, Any]:
        return self._array[start:stop]


def option(default: Any, help: str, *, choices: Sequence[Any] = ()) -> Any:
    """A field of a pass that the command line, recipes and docs offer as an option."""
    metadata = {"help": help, "choices": tuple(choices)}
    if isinstance(default, (list, dict, set)):
        raise TypeError("options are immutable: use a tuple")
    return dataclasses.field(default=default, metadata=metadata)


def from_context(name: str) -> Any:
    """A field that the compile fills in (``target``, ``calibration``, ``seed``), not the user."""
    return dataclasses.field(
        default=None, metadata={"context": name}, repr=False, compare=False, kw_only=True
    )


class Pass(ir.passes.InPlacePass):
    """A pass that changes a model in place.

    Subclasses are frozen dataclasses; fields made by `option` are its options. ``call`` returns
    whether it modified the model, and running a pass twice does no more than running it once.
    One that ``sees_caches`` runs after a decoder was given its caches, the others before.
    """

    name: ClassVar[str]
    preserves: ClassVar[Preserves]
    sees_caches: ClassVar[bool] = False

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        return ir.passes.PassResult(model, self.run(model))

    def run(self, model: ir.Model) -> bool:
        """Change the model; return whether anything changed."""
        raise NotImplementedError


@runtime_checkable
class Deciding(Protocol):
    """A pass that picks one of several ways by their cost, for a target."""

    def decide(self, model: ir.Model) -> ir.passes.PassBase:
        """The pass that goes the way which this one would pick for a model; leaves it as it is."""
        ...


@runtime_checkable
class Placing(Protocol):
    """A pass that does differently for one backend than for another."""

    def placed_for(self) -> str:
        """What of its backend matters: with the same, it does the same."""
        ...


class NodePass(Pass):
    """A pass that looks at one node at a time, in every graph, until nothing changes."""

    def run(self, model: ir.Model) -> bool:
        modified = False
        # Each round can only enable rewrites next to the last ones; the bound guards against
        # two rewrites that undo each other.
        for _ in range(100):
            changed = False
            for graph in list(model.graphs()):
                for node in graph:
                    if node.graph is not None:
                        changed |= self.rewrite(node)
            modified |= changed
            if not changed:
                return modified
        raise RuntimeError(f"the pass {self.name} does not come to rest")

    def rewrite(self, node: ir.Node) -> bool:
        """Rewrite around ``node``; return whether anything changed."""
        raise NotImplementedError


@dataclass(frozen=True)
class Option:
    """An option of a pass, as the command line and the docs see it."""

    name: str
    type: str
    default: Any
    help: str
    choices: tuple[Any, ...]


def options_of(cls: type) -> tuple[Option, ...]:
    """Return the options of a pass, from its fields."""
    return tuple(
        Option(
            field.name,
            str(field.type),
            field.default,
            field.metadata["help"],
            field.metadata["choices"],
        )
        for field in dataclasses.fields(cls)
        if "help" in field.metadata
    )


# --- declining -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Declined:
    """What a pass left alone, and why."""

    where: str
    reason: str


_declined: ContextVar[dict[Declined, None] | None] = ContextVar("declined", default=None)


def decline(subject: ir.Node | ir.Value, reason: str) -> bool:
    """Note that a pass leaves something alone, and why; return False for ``rewrite`` to return."""
    notes = _declined.get()
    if notes is not None:
        name = subject.name or (subject.op_type if isinstance(subject, ir.Node) else "?")
        notes[Declined(name, reason)] = None
    return False


@contextmanager
def declining() -> Iterator[dict[Declined, None]]:
    """Collect what passes decline inside the block, each reason once, in order."""
    notes: dict[Declined, None] = {}
    token = _declined.set(notes)
    try:
        yield notes
    finally:
        _declined.reset(token)


# --- sketching -----------------------------------------------------------------------------------

_sketching: ContextVar[bool] = ContextVar("sketching", default=False)


def sketching() -> bool:
    """Whether only the form of the graph is wanted, for a prediction.

    A pass then reads no weight and no calibration data: it puts `outline` where it would store what
    it computes, and takes any range for those it would find. A pass that does not ask is run as
    ever.
    """
    return _sketching.get()


@contextmanager
def sketched() -> Iterator[None]:
    """Run passes for the form of the graph only."""
    token = _sketching.set(True)
    try:
        yield
    finally:
        _sketching.reset(token)


def outline(dtype: ir.DataType, shape: Sequence[int]) -> ir.TensorProtocol:
    """A stored tensor of which only dtype and shape count.

    Whoever looks all the same (a cost model that counts the bits in use) finds every code of an
    integer in turn, or ones.
    """

    def fill() -> ir.TensorProtocol:
        import numpy as np

        codes = np.ones(1, np.float32)
        if dtype.is_integer():
            signed = dtype.is_signed()
            reach = 2 ** (dtype.bitwidth - signed) - 1
            codes = np.arange(-reach if signed else 0, reach + 1)
        return ir.tensor(np.resize(codes, tuple(shape)).astype(dtype.numpy()), dtype=dtype)

    return ir.LazyTensor(fill, dtype, ir.Shape(shape), cache=False)


# --- reading the graph ---------------------------------------------------------------------------


def is_op(node: ir.Node | None, *op_types: str, domain: str = "") -> bool:
    """Whether a node is one of some operators (of the standard domain unless named)."""
    return node is not None and node.op_type in op_types and node.domain == domain


def is_plain_product(node: ir.Node) -> bool:
    """Whether a product takes its first operand as it lies and what it adds up as it is: a Gemm may
    turn and scale them."""
    factors = (attribute(node, name, 1.0) for name in ("alpha", "beta"))
    return all(factor == 1.0 for factor in factors) and not attribute(node, "transA", 0)


def producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node that makes ``value`` if it is one of ``op_types`` (of the standard domain)."""
    node = value.producer() if value is not None else None
    return node if is_op(node, *op_types) else None


def read_once(value: ir.Value) -> bool:
    """Whether exactly one node reads the value and no graph returns it."""
    return not value.is_graph_output() and len(value.uses()) == 1


def dims(value: ir.Value | None) -> tuple[int | None, ...] | None:
    """The shape with symbolic dimensions as None; None if even the rank is unknown."""
    if value is None or value.shape is None:
        return None
    return tuple(dim if isinstance(dim, int) else None for dim in value.shape)


def is_constant(value: ir.Value | None) -> bool:
    """Whether the value is stored in the model and the caller cannot replace it."""
    return value is not None and not value.is_graph_input() and _tensor(value) is not None


def constant(
    value: ir.Value | None, *, limit: int | None = _SMALL_BYTES
) -> np.ndarray[Any, Any] | None:
    """The content of a constant, or None if it is not one or exceeds ``limit`` bytes.

    With ``limit=None`` the tensor is read whatever its size: for passes that change weights.
    """
    tensor = _tensor(value) if value is not None and not value.is_graph_input() else None
    if tensor is None or (limit is not None and tensor.nbytes > limit):
        return None
    return tensor.numpy()


def weight(value: ir.Value | None) -> np.ndarray[Any, Any] | None:
    """The content of a constant of any size, in memory of its own, or None if it is not one.

    What lies in a file is read, not mapped: the pages of a map count towards this process until it
    is unmapped, and one pass over a model would end with all its weights resident.
    """
    tensor = _tensor(value) if value is not None and not value.is_graph_input() else None
    return _read(tensor) if tensor is not None else None


def _read(tensor: ir.TensorProtocol) -> np.ndarray[Any, Any]:
    if not isinstance(tensor, ir.ExternalTensor) or tensor.dtype.bitwidth < 8:
        return tensor.numpy()
    import numpy as np

    dtype = tensor.dtype.numpy()
    stored = np.fromfile(
        tensor.path, dtype.newbyteorder("<"), count=tensor.size, offset=tensor.offset or 0
    )
    return stored.astype(dtype, copy=False).reshape(tensor.shape.numpy())


def unmap(model: ir.Model) -> None:
    """Close the maps of weights that were read through them; what still has a view stays open."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor) and tensor.raw is not None:
                with suppress(BufferError):
                    tensor.release()


def scalar(value: ir.Value | None) -> float | None:
    """The content of a one-element constant as a float."""
    array = constant(value)
    if array is None or array.size != 1:
        return None
    return float(array.reshape(()))


def _tensor(value: ir.Value) -> ir.TensorProtocol | None:
    return ir.convenience.get_const_tensor(value)


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """The value of an attribute, or ``default``."""
    attr = node.attributes.get(name)
    return attr.value if isinstance(attr, ir.Attr) else default


def graph_of(node: ir.Node) -> ir.Graph:
    """The graph that holds a node; an error if it was removed."""
    if node.graph is None:
        raise ValueError(f"the node {node.name!r} is in no graph")
    return node.graph


# --- changing the graph --------------------------------------------------------------------------


def splice(
    old: Sequence[ir.Node],
    new: ir.Node | Sequence[ir.Node],
    *,
    outputs: Sequence[tuple[ir.Value, ir.Value]] | None = None,
) -> None:
    """Put ``new`` nodes in the place of ``old`` ones.

    Args:
        old: Nodes of one graph, the last in graph order first; the new nodes go where it was.
            Nodes that something else still reads are left in place.
        new: In topological order; their inputs are outputs of each other or of earlier nodes.
        outputs: Pairs (old value, new value); by default the outputs of ``old[0]`` and of the last
            new node. Name, type and shape move to the new value unless it knows better.
    """
    nodes = [new] if isinstance(new, ir.Node) else list(new)
    graph = graph_of(old[0])
    pairs = list(outputs or zip(old[0].outputs, nodes[-1].outputs, strict=False))
    graph.insert_after(old[0], nodes)
    for before, after in pairs:
        replace(before, after)
    for node in old:
        if node.graph is not None and all(unread(value) for value in node.outputs):
            graph_of(node).remove(node, safe=True)


def replace(before: ir.Value, after: ir.Value) -> None:
    """Make every reader of ``before`` (and the graph's outputs) read ``after``.

    A graph output keeps its name; a value that is an input, an initializer or already an output
    cannot take it over, so an Identity stands between.
    """
    after.shape = after.shape if after.shape is not None else before.shape
    after.type = after.type if after.type is not None else before.type
    if before.is_graph_output():
        name = before.name
        if after.producer() is None or after.is_graph_output() or after.graph is not before.graph:
            node = before.producer()
            assert node is not None
            identity = ir.node("Identity", [after])
            graph_of(node).insert_after(node, identity)
            out = identity.outputs[0]
            out.shape, out.type = before.shape, before.type
            before.name = None
            before.replace_all_uses_with(out, replace_graph_outputs=True)
            out.name = name
            return
        before.name = None
        before.replace_all_uses_with(after, replace_graph_outputs=True)
        after.name = name
        return
    if after.producer() is not None and not after.is_graph_output() and after.name is None:
        after.name, before.name = before.name, None
    before.replace_all_uses_with(after)


def unread(value: ir.Value) -> bool:
    """Whether no node reads the value and no graph returns it."""
    return not value.is_graph_output() and not value.uses()


def changed(
    tensor: ir.TensorProtocol,
    change: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]],
    dtype: ir.DataType | None = None,
) -> ir.TensorProtocol:
    """A stored tensor with its content changed, elementwise or within itself.

    What lies in a file is changed when it is asked for, and not kept: the changed weights of a
    model are never in memory together.
    """
    wanted = dtype if dtype is not None else tensor.dtype
    if not isinstance(tensor, (ir.ExternalTensor, ir.LazyTensor)):
        return ir.tensor(change(tensor.numpy()), dtype=wanted, name=tensor.name)

    def compute() -> ir.TensorProtocol:
        return ir.tensor(change(_read(tensor)), dtype=wanted)

    shape = ir.Shape(tensor.shape.numpy())
    return ir.LazyTensor(compute, wanted, shape, cache=False, name=tensor.name)


def initializer(
    graph: ir.Graph, array: np.ndarray[Any, Any] | ir.TensorProtocol, name: str
) -> ir.Value:
    """Store a new constant in ``graph`` under a name made unique from ``name``."""
    unique, index = name, 1
    taken = graph.initializers
    while unique in taken:
        unique, index = f"{name}_{index}", index + 1
    tensor = ir.tensor(array, name=unique) if not isinstance(array, ir.TensorProtocol) else array
    tensor.name = unique
    value = ir.Value(
        name=unique,
        shape=ir.Shape(tensor.shape.numpy()),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value


# --- tables of operators -------------------------------------------------------------------------


def entering(table: dict[str, Entry]) -> Callable[..., Callable[[Entry], Entry]]:
    """Return the decorator ``@enter(*op_types)`` that fills a table "operator -> something".

    A second entry for an operator is a ``ValueError`` when its module is imported.
    """

    def enter(*op_types: str) -> Callable[[Entry], Entry]:
        def register(entry: Entry) -> Entry:
            for op_type in op_types:
                if op_type in table:
                    raise ValueError(f"two entries for {op_type}")
                table[op_type] = entry
            return entry

        return register

    return enter


def opset_of(node: ir.Node) -> int:
    """The version of a node's domain; a body does not know its model's, and normal form has one."""
    from trivium.compiler.model import OPSET

    domain = "" if node.domain == "ai.onnx" else node.domain
    imports = node.graph.opset_imports if node.graph is not None else {}
    return imports.get(domain, OPSET if domain == "" else 1)
