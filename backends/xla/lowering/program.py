"""A whole model as a pure, traceable function: what the rest of the backend builds on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from trivium.backends.xla.lowering import dimensions, packing, repeats
from trivium.backends.xla.lowering.constants import weights_of
from trivium.backends.xla.lowering.dtypes import numpy_dtype, precise
from trivium.backends.xla.lowering.lazy import jnp
from trivium.backends.xla.lowering.packing import Order
from trivium.backends.xla.lowering.quantized import Mode
from trivium.backends.xla.lowering.trace import Env, Frame, run_graph, run_nodes
from trivium.backends.xla.platforms import Platform
from trivium.compiler.errors import BadInput
from trivium.compiler.model import signature
from trivium.compiler.types import TensorInfo


@dataclass(frozen=True)
class Lowered:
    """A model as a function.

    Attributes:
        function: ``(weights, inputs) -> outputs``, each a mapping by name. Pure and traceable:
            jit it, differentiate it, export it. It switches 64-bit types on for itself; call
            jit inside `precise` too, so that 64-bit arguments reach it whole. (jit sorts the keys
            of a mapping: take outputs by name.) Products use the platform's default
            precision: full float32 on a CPU, bfloat16 passes on a TPU unless
            ``jax.default_matmul_precision`` says otherwise.
        weights: The constants that it takes as arguments, by name, unread.
        inputs, outputs: The model's signature, initializers left out.
        places: Where in the model each weight is.
        packed: The weights that it takes with their axes in another order than the model's.
        stacks: The weights that are several of the model's in one, by the names of those.
    """

    function: Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]
    weights: Mapping[str, ir.TensorProtocol]
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    places: Mapping[str, ir.Value]
    packed: Mapping[str, Order] = field(default_factory=dict)
    stacks: Mapping[str, list[str]] = field(default_factory=dict)

    def read(self) -> dict[str, np.ndarray[Any, Any]]:
        """Read all weights into memory."""
        return {name: self.pack(name, tensor.numpy()) for name, tensor in self.weights.items()}

    def pack(self, name: str, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """A weight of the model as the function takes it."""
        return packing.packed(array, self.packed.get(name))


def lower(
    model: ir.Model,
    *,
    quantized: Mode = "integer",
    shardings: Mapping[ir.Value, Any] | None = None,
    platform: Platform | None = None,
    pack: bool = False,
    roll: bool = False,
) -> Lowered:
    """Lower a model; nothing is read or traced yet.

    Args:
        quantized: What products do whose operands are dequantized: compute on the integers, on
            floats, or on floats with gradients straight through each quantization.
        shardings: jax's sharding of values that have to be spread in a given way.
        platform: What the program is for, if only for that: it may be lowered to what is fast
            there and slow elsewhere.
        roll: Whether layers that are the same run as one scan, if there are some (see `repeats`);
            their weights are then taken stacked, and ``Lowered.stacks`` says how.
        pack: Whether the function takes weights in the order that XLA's CPU reads them in.

    Shapes need not be bound: they are taken from the arguments when the function is traced, and may
    be symbolic there (`dimensions`). Known inputs (numpy arrays instead of jax ones, outside jit)
    are folded like constants.

    Raises (when traced):
        Unsupported: An operator without a road, or a shape that depends on data; one node of it.
    """
    tensors = weights_of(model)
    named = _named(tensors)
    inputs, outputs = signature(model)
    arguments = [value for value in model.graph.inputs if value.name in {i.name for i in inputs}]
    functions = dict(model.functions)
    orders = packing.orders_of(named) if pack else {}
    found = repeats.find(model.graph, tensors) if roll else None
    stacks = repeats.stack_names(found) if found is not None else {}
    gone = {name for names in stacks.values() for name in names}
    alone = {name: value for name, value in named.items() if name not in gone}

    def function(weights: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        with precise():
            env: Env = {
                value: packing.unpacked(weights[name], orders.get(name))
                for name, value in alone.items()
            }
            symbols: dict[str, Any] = {}
            for value in arguments:
                env[value] = _argument(value, given)
                symbols |= dimensions.bindings(value.shape, getattr(env[value], "shape", ()))
            frame = Frame(
                env,
                model.graph.opset_imports,
                functions,
                mode=quantized,
                shardings=shardings or {},
                platform=platform,
                symbols=symbols,
            )
            if found is None:
                results = run_graph(model.graph, frame)
            else:
                results = _run_rolled(model.graph, found, stacks, weights, frame)
            names = [value.name or "" for value in model.graph.outputs]
            return {name: _result(r) for name, r in zip(names, results, strict=True)}

    weights = {name: tensors[value] for name, value in alone.items()}
    places = dict(alone)
    for name, members in stacks.items():
        weights[name] = _stack(name, [tensors[named[member]] for member in members])
        places[name] = named[members[0]]
    return Lowered(function, weights, inputs, outputs, places, orders, stacks)


def _run_rolled(
    graph: ir.Graph,
    found: repeats.Repeats,
    stacks: Mapping[str, list[str]],
    weights: Mapping[str, Any],
    frame: Frame,
) -> tuple[Any, ...]:
    of_a_stack = {value for values in found.stacked.values() for value in values}
    for value in graph.initializers.values():
        if value not in frame.env and value not in of_a_stack and value.const_value is not None:
            frame.env[value] = value.const_value.numpy()
    given = {head: weights[name] for head, name in zip(found.stacked, stacks, strict=True)}
    repeats.run(
        found, given, frame.env, lambda nodes, env: run_nodes(nodes, replace(frame, env=env))
    )
    return tuple(frame.env[value] for value in graph.outputs)


def _stack(name: str, members: Sequence[ir.TensorProtocol]) -> ir.TensorProtocol:
    """The tensor of several in one, read one after the other when it is asked for."""
    shape = ir.Shape([len(members), *members[0].shape.numpy()])

    def content() -> ir.TensorProtocol:
        return ir.tensor(np.stack([one.numpy() for one in members]), dtype=members[0].dtype)

    return ir.LazyTensor(content, members[0].dtype, shape, cache=False, name=name)


def _named(tensors: Mapping[ir.Value, ir.TensorProtocol]) -> dict[str, ir.Value]:
    """Weights by name; those of subgraphs may share theirs, and get a number."""
    named: dict[str, ir.Value] = {}
    for value in tensors:
        name, count = value.name or "weight", 1
        while name in named:
            name, count = f"{value.name}.{count}", count + 1
        named[name] = value
    return named


def _argument(value: ir.Value, given: Mapping[str, Any]) -> Any:
    name = value.name or ""
    if name not in given:
        raise BadInput(
            f"the input {name!r} is missing", remedy=f"it was given: {', '.join(given) or 'none'}"
        )
    array = given[name]
    if value.dtype is None or not hasattr(array, "dtype") or value.dtype == ir.DataType.STRING:
        return array
    declared = numpy_dtype(value.dtype)
    return array if array.dtype == declared else array.astype(declared)


def _result(value: Any) -> Any:
    if isinstance(value, list):
        return [_result(item) for item in value]
    text = (
        isinstance(value, np.ndarray)
        and value.dtype.kind in "OSUT"
        and not dimensions.has_symbols(value)
    )
    return value if value is None or text else jnp.asarray(dimensions.traced(value))
