"""What the mask of an Attention means, found out by evaluating it.

Exporters write causal masks in many guises (Trilu, comparisons of ranges, gathers by computed
indices, sums of negative numbers). A mask is cheap, so it is evaluated at several lengths for
padding drawn at random, and looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from trivium.compiler.passing import is_constant, is_op

_LENGTHS = (17, 1, 2, 3, 5, 8, 12)
"""The longest first: the others are compared with it."""

_BATCH = 3

_MASKED = -1e4
"""At this and below, a number that is added to a score masks it."""


def mask_problem(graph: ir.Graph, mask: ir.Value, symbol: str, *, causal: bool) -> str | None:
    """Say why a cache cannot be trusted with a mask, or None if it can.

    What a query may see must not depend on tokens after it: growing the sequence must leave the
    rows and columns that were there, and with ``causal`` no query may see a later key.

    Args:
        graph: The graph that computes the mask from the attention mask and from lengths.
        mask: Over queries and keys in its last two axes.
        symbol: The symbolic dimension that is the sequence.
        causal: Whether the mask itself has to hide the future.
    """
    rng = np.random.default_rng(0)
    longest = _LENGTHS[0]
    padding = {
        value: rng.integers(0, 2, (_BATCH, longest)) for value in graph.inputs if value.shape
    }
    try:
        seen = [_evaluate(graph, mask, symbol, length, padding) for length in _LENGTHS]
    except Exception as error:  # the evaluator raises whatever numpy does
        return f"its mask cannot be evaluated ({type(error).__name__})"
    for length, allowed in zip(_LENGTHS, seen, strict=True):
        if allowed.shape[-1] != length or allowed.shape[-2] not in (1, length):
            return "its mask does not span the sequence"
        if causal and np.triu(np.broadcast_to(allowed, _square(allowed)), 1).any():
            return "it may look at tokens that are yet to come"
        rows = slice(None) if seen[0].shape[-2] == 1 else slice(length)
        if not np.array_equal(allowed, seen[0][..., rows, :length]):
            return "its mask changes for earlier tokens when later ones come"
    return None


def _square(array: np.ndarray[Any, Any]) -> tuple[int, ...]:
    return (*array.shape[:-2], array.shape[-1], array.shape[-1])


def _evaluate(
    graph: ir.Graph,
    mask: ir.Value,
    symbol: str,
    length: int,
    padding: Mapping[ir.Value, np.ndarray[Any, Any]],
) -> np.ndarray[Any, Any]:
    """Evaluate a mask for a sequence of ``length`` tokens; True where a key may be seen."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    nodes: list[ir.Node] = []
    feeds: dict[ir.Value, np.ndarray[Any, Any]] = {}
    constants: dict[ir.Value, ir.TensorProtocol] = {}
    front, reached = [mask], set[ir.Value]()
    while front:
        value = front.pop()
        if value in reached:
            continue
        reached.add(value)
        node = value.producer()
        if is_constant(value) and node is None and value.const_value is not None:
            constants[value] = value.const_value
        elif node is None:
            shape = _sizes(value, symbol, length)
            drawn = padding[value][tuple(slice(size) for size in shape)]
            assert value.dtype is not None
            feeds[value] = drawn.reshape(shape).astype(value.dtype.numpy())
        elif is_op(node, "Shape"):
            start, end = (node.attributes.get(name) for name in ("start", "end"))
            sizes = _sizes(node.inputs[0], symbol, length)
            chosen = slice(start.as_int() if start else None, end.as_int() if end else None)
            feeds[value] = np.array(sizes[chosen], np.int64)
        else:
            nodes.append(node)
            front.extend(v for v in node.inputs if v is not None)
            reached.update(node.outputs)
    place = {node: index for index, node in enumerate(graph)}
    nodes.sort(key=place.__getitem__)
    proto = onnx.helper.make_model(
        onnx.helper.make_graph(
            [ir.to_proto(node) for node in nodes],
            "mask",
            [_info(value, array) for value, array in feeds.items()],
            [onnx.helper.make_value_info(mask.name or "", onnx.TypeProto())],
            # In memory: the evaluator would look for those that lie in a file beside a model's.
            [
                ir.to_proto(ir.tensor(tensor.numpy().copy(), tensor.dtype, name=value.name))
                for value, tensor in constants.items()
            ],
        ),
        opset_imports=[onnx.helper.make_opsetid("", graph.opset_imports[""])],
    )
    named = {value.name or "": array for value, array in feeds.items()}
    (result,) = ReferenceEvaluator(proto).run(None, named)
    found = np.asarray(result)
    return found if found.dtype == bool else found > _MASKED


def _sizes(value: ir.Value | None, symbol: str, length: int) -> list[int]:
    """A shape with the sequence at ``length``; every other open dimension is the batch."""
    assert value is not None
    assert value.shape is not None
    sizes = []
    for dim in value.shape:
        if isinstance(dim, int):
            sizes.append(dim)
        elif dim.value is None:
            raise ValueError(f"a dimension of {value.name} is not known")
        else:
            sizes.append(length if dim.value == symbol else _BATCH)
    return sizes


def _info(value: ir.Value, array: np.ndarray[Any, Any]) -> Any:
    import onnx

    dtype = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    return onnx.helper.make_tensor_value_info(value.name or "", dtype, array.shape)
