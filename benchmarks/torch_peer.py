"""An ONNX graph as a PyTorch module: the peer that compiled artifacts are timed against.

The graph is the artifact's own (its ``model.onnx``), run once through PyTorch's operators with
``make_fx``, so that what is timed is a straight list of PyTorch calls: eager runs it as it stands,
``torch.compile`` optimizes it. Shape arithmetic is done by numpy on the way and leaves no trace.
It is the same mathematics as the artifact's, not the code of whoever trained the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch.nn import functional

from trivium.compiler import shapes
from trivium.compiler.errors import Unsupported
from trivium.compiler.types import TensorInfo, Workload

Handler = Callable[..., Any]
HANDLERS: dict[str, Handler] = {}


def peer_of(
    folder: Path, workload: Workload, inputs: tuple[TensorInfo, ...], device: str
) -> tuple[Any, tuple[Any, ...]]:
    """Return a graph module and the weights that it takes before the inputs.

    Args:
        folder: Of an artifact that has a ``model.onnx``.
        inputs: Of its program, which are the module's, in this order.

    Raises:
        Unsupported: An operator has no counterpart below.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    model = ir.load(folder / "model.onnx")
    shapes.bind(model, workload)
    named = {
        value: torch.from_numpy(np.array(value.const_value.numpy())).to(device)
        for value in model.graph.initializers.values()
        if value.const_value is not None and not _is_shape(value.const_value)
    }
    by_name = {value.name: value for value in model.graph.inputs}
    arguments = [by_name[info.name] for info in inputs]

    def run(weights: tuple[Any, ...], *given: Any) -> tuple[Any, ...]:
        env: dict[ir.Value, Any] = dict(zip(named, weights, strict=True))
        env.update(zip(arguments, given, strict=True))
        for value in model.graph.initializers.values():
            if value not in env and value.const_value is not None:
                env[value] = value.const_value.numpy()
        for node in model.graph:
            _run(node, env)
        return tuple(_tensor(env[value], device) for value in model.graph.outputs)

    weights = tuple(named.values())
    kinds = [getattr(torch, info.dtype) for info in inputs]
    examples = [
        torch.ones(tuple(map(int, info.shape)), dtype=kind, device=device)
        for info, kind in zip(inputs, kinds, strict=True)
    ]
    with torch.no_grad():
        return make_fx(run)(weights, *examples), weights


def _is_shape(tensor: ir.TensorProtocol) -> bool:
    """Whether a constant is rather a size, an axis or a scalar than a weight."""
    return tensor.dtype in (ir.DataType.INT64, ir.DataType.INT32) and tensor.size <= 16


def _tensor(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, (np.ndarray, np.generic)):
        return torch.from_numpy(np.array(value)).to(device)
    return value


def _run(node: ir.Node, env: dict[ir.Value, Any]) -> None:
    handler = HANDLERS.get(node.op_type) if node.domain == "" else None
    if handler is None:
        raise Unsupported(
            f"no PyTorch counterpart of {node.domain or 'ai.onnx'}.{node.op_type}",
            about=node.name or "peer",
        )
    inputs = [None if value is None else env[value] for value in node.inputs]
    device = next((x.device for x in inputs if isinstance(x, torch.Tensor)), "cpu")
    if node.op_type not in TAKES_NUMPY:
        inputs = [_tensor(value, device) for value in inputs]
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    results = handler(attributes, *inputs)
    results = results if isinstance(results, tuple) else (results,)
    env.update(zip(node.outputs, results, strict=False))


TAKES_NUMPY = {
    "Cast", "Concat", "CumSum", "Expand", "Gather", "Pad", "ReduceL2", "ReduceMax", "ReduceMean",
    "ReduceSum", "Reshape", "Shape", "Slice", "Split", "Squeeze", "Unsqueeze",
}  # fmt: skip
"""Operators whose handlers are given what is known as numpy: sizes, axes."""

Attributes = Mapping[str, Any]


def handles(*names: str) -> Callable[[Handler], Handler]:
    def register(function: Handler) -> Handler:
        for name in names:
            if name in HANDLERS:
                raise ValueError(f"two handlers for {name}")
            HANDLERS[name] = function
        return function

    return register


def _plain(name: str, function: Callable[..., Any]) -> None:
    handles(name)(lambda attributes, *inputs: function(*inputs))


_plain("Add", torch.add)
_plain("Sub", torch.sub)
_plain("Mul", torch.mul)
_plain("Div", torch.div)
_plain("Pow", torch.pow)
_plain("Exp", torch.exp)
_plain("Sqrt", torch.sqrt)
_plain("Tanh", torch.tanh)
_plain("Relu", torch.relu)
_plain("Sigmoid", torch.sigmoid)
_plain("Reciprocal", torch.reciprocal)
_plain("Erf", torch.erf)
_plain("Neg", torch.neg)
_plain("Equal", torch.eq)
_plain("Where", torch.where)
_plain("MatMul", torch.matmul)
_plain("Identity", lambda x: x)
_plain("Swish", functional.silu)
_plain("GlobalAveragePool", lambda x: x.mean(tuple(range(2, x.ndim)), keepdim=True))
_plain("GlobalMaxPool", lambda x: x.amax(tuple(range(2, x.ndim)), keepdim=True))


def _fold(function: Callable[[Any, Any], Any]) -> Handler:
    def folded(attributes: Attributes, first: Any, *rest: Any) -> Any:
        for one in rest:
            first = function(first, one)
        return first

    return folded


handles("Max")(_fold(torch.maximum))
handles("Min")(_fold(torch.minimum))
handles("Sum")(_fold(torch.add))


@handles("Gelu")
def gelu(a: Attributes, x: Any) -> Any:
    return functional.gelu(x, approximate=a.get("approximate", "none"))


@handles("LeakyRelu")
def leaky_relu(a: Attributes, x: Any) -> Any:
    return functional.leaky_relu(x, a.get("alpha", 0.01))


@handles("Clip")
def clip(a: Attributes, x: Any, low: Any = None, high: Any = None) -> Any:
    return torch.clamp(x, low, high)


@handles("Softmax")
def softmax(a: Attributes, x: Any) -> Any:
    return torch.softmax(x, a.get("axis", -1))


@handles("CumSum")
def cumulated(a: Attributes, x: Any, axis: Any) -> Any:
    if a.get("exclusive", 0) or a.get("reverse", 0) or not _known(axis):
        raise Unsupported("no PyTorch counterpart of this sum", about="peer")
    return torch.cumsum(x, int(np.asarray(axis).item()), dtype=x.dtype)


@handles("Transpose")
def transpose(a: Attributes, x: Any) -> Any:
    return x.permute(tuple(a.get("perm", reversed(range(x.ndim)))))


@handles("Flatten")
def flatten(a: Attributes, x: Any) -> Any:
    axis = a.get("axis", 1)
    return x.reshape(int(np.prod(x.shape[:axis])), -1)


@handles("Gemm")
def gemm(a: Attributes, x: Any, w: Any, c: Any = None) -> Any:
    x = x.T if a.get("transA", 0) else x
    w = w.T if a.get("transB", 0) else w
    alpha, beta = a.get("alpha", 1.0), a.get("beta", 1.0)
    if c is None:
        return torch.mm(x, w) * alpha
    return torch.addmm(c, x, w, beta=beta, alpha=alpha)


def _window(a: Attributes, rank: int) -> tuple[list[int], list[int], list[int]]:
    """Strides, dilations and pads, ONNX's defaults filled in."""
    if a.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID", ""):
        raise Unsupported("no PyTorch counterpart of automatic padding", about="peer")
    ones, pads = [1] * rank, list(a.get("pads", [0] * (2 * rank)))
    return list(a.get("strides", ones)), list(a.get("dilations", ones)), pads


def _padded(x: Any, pads: list[int], value: float) -> tuple[Any, list[int]]:
    """Pad what is not the same on both sides; the rest is left to the operator."""
    rank = len(pads) // 2
    if pads[:rank] == pads[rank:]:
        return x, pads[:rank]
    both = [amount for i in reversed(range(rank)) for amount in (pads[i], pads[i + rank])]
    return functional.pad(x, both, value=value), [0] * rank


@handles("Conv")
def conv(a: Attributes, x: Any, w: Any, bias: Any = None) -> Any:
    strides, dilations, pads = _window(a, x.ndim - 2)
    x, padding = _padded(x, pads, 0.0)
    function = {3: functional.conv1d, 4: functional.conv2d, 5: functional.conv3d}[x.ndim]
    return function(x, w, bias, strides, padding, dilations, a.get("group", 1))


@handles("MaxPool")
def max_pool(a: Attributes, x: Any) -> Any:
    strides, dilations, pads = _window(a, x.ndim - 2)
    x, padding = _padded(x, pads, float("-inf"))
    ceil = bool(a.get("ceil_mode", 0))
    return functional.max_pool2d(x, a["kernel_shape"], strides, padding, dilations, ceil)


@handles("AveragePool")
def average_pool(a: Attributes, x: Any) -> Any:
    strides, _, pads = _window(a, x.ndim - 2)
    included = bool(a.get("count_include_pad", 0))
    x, padding = _padded(x, pads, 0.0)
    if any(pads) and padding != pads[: len(padding)] and not included:
        raise Unsupported("no PyTorch counterpart of uneven padding left out", about="peer")
    ceil = bool(a.get("ceil_mode", 0))
    return functional.avg_pool2d(x, a["kernel_shape"], strides, padding, ceil, included)


@handles("BatchNormalization")
def batch_normalization(a: Attributes, x: Any, s: Any, b: Any, mean: Any, var: Any) -> Any:
    return functional.batch_norm(x, mean, var, s, b, eps=a.get("epsilon", 1e-5))


@handles("LayerNormalization")
def layer_normalization(a: Attributes, x: Any, scale: Any, bias: Any = None) -> Any:
    shape = x.shape[a.get("axis", -1) % x.ndim :]
    return functional.layer_norm(x, shape, scale, bias, a.get("epsilon", 1e-5))


@handles("RMSNormalization")
def rms_normalization(a: Attributes, x: Any, scale: Any) -> Any:
    shape = x.shape[a.get("axis", -1) % x.ndim :]
    return functional.rms_norm(x, shape, scale, a.get("epsilon", 1e-5))


@handles("Attention")
def attention(a: Attributes, q: Any, k: Any, v: Any, mask: Any = None, *rest: Any) -> Any:
    if any(value is not None for value in rest) or a.get("softcap", 0.0):
        raise Unsupported("no PyTorch counterpart of attention with a cache", about="peer")
    flat = q.ndim == 3
    if flat:
        q, k, v = (
            x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)
            for x, heads in ((q, a["q_num_heads"]), (k, a["kv_num_heads"]), (v, a["kv_num_heads"]))
        )
    y = functional.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=bool(a.get("is_causal", 0)),
        scale=a.get("scale"),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return y.transpose(1, 2).flatten(2) if flat else y


@handles("RotaryEmbedding")
def rotary_embedding(a: Attributes, x: Any, cos: Any, sin: Any, positions: Any = None) -> Any:
    if a.get("rotary_embedding_dim", 0) or a.get("interleaved", 0):
        raise Unsupported("no PyTorch counterpart of this rotation", about="peer")
    flat = x.ndim == 3
    if flat:
        x = x.reshape(*x.shape[:2], a["num_heads"], -1).transpose(1, 2)
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    left, right = x.chunk(2, -1)
    y = torch.cat((left * cos - right * sin, right * cos + left * sin), -1)
    return y.transpose(1, 2).flatten(2) if flat else y


@handles("DepthToSpace")
def depth_to_space(a: Attributes, x: Any) -> Any:
    if a.get("mode", "DCR") == "CRD":
        return functional.pixel_shuffle(x, a["blocksize"])
    n, c, h, w = x.shape
    size = a["blocksize"]
    x = x.reshape(n, size, size, c // size**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return x.reshape(n, c // size**2, h * size, w * size)


# What follows takes sizes and axes as numpy, and folds them where all is known.


def _known(*values: Any) -> bool:
    return all(not isinstance(value, torch.Tensor) for value in values)


def _ints(value: Any) -> list[int]:
    return [int(item) for item in np.asarray(value).reshape(-1)]


@handles("Shape")
def shape_of(a: Attributes, x: Any) -> Any:
    return np.asarray(tuple(x.shape)[a.get("start", 0) : a.get("end")], np.int64)


@handles("Cast")
def cast(a: Attributes, x: Any) -> Any:
    dtype = ir.DataType(a["to"]).numpy()
    return x.astype(dtype) if _known(x) else x.to(getattr(torch, str(dtype)))


@handles("Concat")
def concat(a: Attributes, *inputs: Any) -> Any:
    if _known(*inputs):
        return np.concatenate(inputs, a["axis"])
    device = next(x.device for x in inputs if isinstance(x, torch.Tensor))
    return torch.cat([_tensor(x, str(device)) for x in inputs], a["axis"])


@handles("Gather")
def gather(a: Attributes, x: Any, indices: Any) -> Any:
    axis = a.get("axis", 0)
    if _known(x, indices):
        return np.take(x, indices, axis)
    if _known(indices):
        indices = torch.from_numpy(np.array(indices)).to(x.device)
    if axis == 0:
        return functional.embedding(indices, x) if x.ndim == 2 else x[indices]
    y = torch.index_select(x, axis, indices.reshape(-1))
    return y.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis % x.ndim + 1 :])


@handles("Reshape")
def reshape(a: Attributes, x: Any, shape: Any) -> Any:
    sizes = [x.shape[i] if size == 0 else size for i, size in enumerate(_ints(shape))]
    return x.reshape(tuple(sizes))


@handles("Expand")
def expand(a: Attributes, x: Any, shape: Any) -> Any:
    sizes = np.broadcast_shapes(tuple(x.shape), tuple(_ints(shape)))
    return np.broadcast_to(x, sizes) if _known(x) else x.expand(sizes)


@handles("Unsqueeze")
def unsqueeze(a: Attributes, x: Any, axes: Any) -> Any:
    rank = x.ndim + len(_ints(axes))
    for axis in sorted(axis % rank for axis in _ints(axes)):
        x = np.expand_dims(x, axis) if _known(x) else x.unsqueeze(axis)
    return x


@handles("Squeeze")
def squeeze(a: Attributes, x: Any, axes: Any = None) -> Any:
    ones = [i for i, size in enumerate(x.shape) if size == 1] if axes is None else _ints(axes)
    gone = {axis % x.ndim for axis in ones}
    return x.reshape(tuple(size for i, size in enumerate(x.shape) if i not in gone))


@handles("Slice")
def slice_of(
    a: Attributes, x: Any, starts: Any, ends: Any, axes: Any = None, by: Any = None
) -> Any:
    chosen = range(len(_ints(starts))) if axes is None else _ints(axes)
    steps = [1] * len(_ints(starts)) if by is None else _ints(by)
    index = [slice(None)] * x.ndim
    for axis, start, end, step in zip(chosen, _ints(starts), _ints(ends), steps, strict=True):
        index[axis] = slice(start, end, step)
    return x[tuple(index)]


@handles("Split")
def split(a: Attributes, x: Any, sizes: Any = None) -> Any:
    axis = a.get("axis", 0)
    if sizes is None:
        return tuple(torch.chunk(x, a["num_outputs"], axis))
    return tuple(torch.split(x, _ints(sizes), axis))


@handles("Pad")
def pad(a: Attributes, x: Any, pads: Any, value: Any = None, axes: Any = None) -> Any:
    if axes is not None or a.get("mode", "constant") != "constant":
        raise Unsupported("no PyTorch counterpart of this padding", about="peer")
    amounts, rank = _ints(pads), x.ndim
    both = [n for i in reversed(range(rank)) for n in (amounts[i], amounts[i + rank])]
    return functional.pad(x, both, value=0.0 if value is None else np.asarray(value).item())


def _reduction(name: str, function: Callable[..., Any]) -> None:
    @handles(name)
    def reduced(a: Attributes, x: Any, axes: Any = None) -> Any:
        given = _ints(axes) if axes is not None else list(a.get("axes", range(x.ndim)))
        return function(x, tuple(given), keepdim=bool(a.get("keepdims", 1)))


_reduction("ReduceSum", torch.sum)
_reduction("ReduceMean", torch.mean)
_reduction("ReduceMax", torch.amax)
_reduction("ReduceL2", lambda x, dim, keepdim: torch.linalg.vector_norm(x, 2, dim, keepdim))
