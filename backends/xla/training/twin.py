"""The trainable twin of a graph: float weights behind everything that a recipe quantized.

A weight that the graph stores as integers (a DequantizeLinear of a constant) becomes a *latent*
float of the same shape. What the twin computes with is that latent rounded to the recipe's grid,
with gradients straight through the rounding; so training sees exactly the numbers that the
quantized model will hold, and `write_back` only has to store the codes. Scales, of activations too,
may learn as well, as a factor on what the recipe chose, by the gradient of LSQ (Esser et al.,
2020). The scale of a bias that is stored as integers follows that of the activation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import onnx_ir as ir

from trivium.backends.xla import gradients
from trivium.backends.xla.lowering import Lowered, lower
from trivium.backends.xla.lowering.dtypes import is_float
from trivium.backends.xla.lowering.lazy import jnp, lax
from trivium.backends.xla.training.trainable import is_trainable
from trivium.compiler.errors import BadInput
from trivium.compiler.passing import attribute, initializer, is_constant, producer, weight

Array = np.ndarray[Any, np.dtype[Any]]
Parameters = dict[str, Any]

SCALE = "/scale"
"""What is appended to a weight's name to call the logarithm of its scale's factor."""


@dataclass(frozen=True)
class Grid:
    """How one quantized weight is stored.

    Attributes:
        codes, scale: The initializers of the quantized model.
        zero: Zero points in the shape of the scales, or None.
        axis, block: Where scales vary; a block of 0 is one scale for each place along the axis.
        low, high: The least and the largest code that the recipe used: a grid of 3 bits may be
            stored in 4.
        trains_scale: Whether the scale belongs to this weight alone.
        follows: The scale of the activation, by name, whose factor this scale takes as well.
    """

    codes: ir.Value
    scale: ir.Value
    zero: Array | None
    axis: int
    block: int
    low: float
    high: float
    trains_scale: bool
    follows: str = ""

    def values(self, latent: Any, scale: Any) -> Any:
        """The latent on the grid, with gradients through the rounding."""
        wide = self._spread(scale, latent.shape)
        ratio = self._ratio(latent, wide)
        return (ratio + lax.stop_gradient(self._rounded(ratio) - ratio)) * wide

    def coded(self, latent: Any, scale: Any) -> Any:
        """The codes that stand for a latent, as floats."""
        wide = self._spread(scale, latent.shape)
        rounded = self._rounded(self._ratio(latent, wide))
        return rounded if self.zero is None else rounded + self._spread(self.zero, latent.shape)

    def _ratio(self, latent: Any, scale: Any) -> Any:
        low: Any = np.float32(self.low)
        high: Any = np.float32(self.high)
        if self.zero is not None:
            zero = self._spread(self.zero, latent.shape)
            low, high = low - zero, high - zero
        return jnp.clip(latent / scale, low, high)

    def _rounded(self, ratio: Any) -> Any:
        assert self.codes.dtype is not None
        if self.codes.dtype.is_floating_point():
            return ratio.astype(self.codes.dtype.numpy()).astype(ratio.dtype)
        return jnp.round(ratio)

    def _spread(self, parameter: Any, shape: tuple[int, ...]) -> Any:
        parameter = jnp.asarray(parameter, "float32")
        if parameter.size == 1:
            return jnp.reshape(parameter, ())
        if not self.block:
            return jnp.reshape(parameter, [-1 if i == self.axis else 1 for i in range(len(shape))])
        wide = jnp.repeat(parameter, self.block, axis=self.axis)
        return lax.slice_in_dim(wide, 0, shape[self.axis], axis=self.axis)


@dataclass(frozen=True)
class Twin:
    """A model as something to train.

    Attributes:
        model: What is tuned; `write_back` changes it.
        graph: The copy that is differentiated.
        lowered: The copy as a function of all its weights.
        start: Trainable parameters by name.
        fixed: The other constants.
        grids: Of the parameters that are stored quantized.
        activations: Initializers of the model that are scales of activations, by name, if trained.
    """

    model: ir.Model
    graph: ir.Model
    lowered: Lowered
    start: Parameters
    fixed: Parameters
    grids: Mapping[str, Grid]
    activations: Mapping[str, ir.Value]

    def weights(self, parameters: Parameters, masks: Mapping[str, Any]) -> Parameters:
        """What the graph computes with: parameters on their grids, zeros where masks say."""
        made = {}
        for name, value in parameters.items():
            if name.endswith(SCALE):
                continue
            if name in masks:
                value = jnp.where(masks[name], value, jnp.zeros((), value.dtype))
            if name in self.grids:
                value = self.grids[name].values(value, self.scale(name, parameters))
            made[name] = value
        return made

    def run(
        self, parameters: Parameters, masks: Mapping[str, Any], feeds: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Compute the graph's outputs."""
        weights = {**self.fixed, **self.weights(parameters, masks)}
        return self.lowered.function(weights, {**feeds, **self._activation_scales(parameters)})

    def _activation_scales(self, parameters: Parameters) -> dict[str, Any]:
        return {
            name: self.fixed[name + SCALE] * jnp.exp(parameters[name + SCALE])
            for name in self.activations
        }

    def scale(self, name: str, parameters: Parameters) -> Any:
        """The scale of a quantized weight as training has it."""
        stored = self.fixed[name + SCALE]
        factor = parameters.get((self.grids[name].follows or name) + SCALE)
        return stored if factor is None else stored * jnp.exp(factor)

    def write_back(self, parameters: Parameters, masks: Mapping[str, Any]) -> None:
        """Store parameters in the model: floats as they are, the rest as codes and scales."""
        floats = {}
        for name, value in parameters.items():
            if name.endswith(SCALE):
                continue
            if name in masks:
                value = jnp.where(masks[name], value, jnp.zeros((), value.dtype))
            grid = self.grids.get(name)
            if grid is None:
                floats[name] = value
                continue
            scale = self.scale(name, parameters)
            _store(grid.codes, np.asarray(grid.coded(value, scale)))
            if (grid.follows or name) + SCALE in parameters:
                _store(grid.scale, np.asarray(scale))
        for name, scale in self._activation_scales(parameters).items():
            _store(self.activations[name], np.asarray(scale))
        gradients.write_back(self.model, floats)


def twin(
    model: ir.Model,
    source: ir.Model,
    *,
    freeze: tuple[str, ...] = (),
    scales: bool = True,
    taps: Mapping[str, str] | None = None,
    logits: bool = True,
) -> Twin:
    """Make the twin of a model.

    Args:
        model: After its recipe.
        source: Before it. Where a weight of it lies on the recipe's grid, its latent starts from
            the weight itself rather than from the middle of its cell: it knows which of its
            neighbours on the grid is nearer.
        freeze: Names of weights to leave alone.
        scales: Whether to train the scales of weights and activations.
        taps: Values to return besides the outputs, by the name to call them.
        logits: Whether to return what a Softmax at the end reads, in its place.

    Raises:
        BadInput: Nothing is left to train, or a tap is not in the graph.
    """
    copy = model.clone()
    originals = source.graph.initializers
    start: Parameters = {}
    fixed: Parameters = {}
    grids: dict[str, Grid] = {}
    mine = ir.convenience.create_value_mapping(model.graph)
    activations = _activation_scales(copy, mine) if scales else {}
    for node in list(copy.graph.all_nodes()):
        if node.op_type != "DequantizeLinear" or node.domain or not is_constant(node.inputs[0]):
            continue
        _replace(node, copy.graph, mine, originals, start, fixed, grids, scales, activations)
    for name in activations:
        _let_in(copy.graph, name, start, fixed)
    tap(copy, taps or {})
    if logits:
        expose_logits(copy)
    lowered = lower(copy, quantized="straight-through")
    for name, array in lowered.read().items():
        if name in start:
            continue
        value = lowered.places[name]
        wanted = is_float(array.dtype) and is_trainable(value, array) and array.dtype != np.float64
        (start if wanted else fixed)[name] = jnp.asarray(array)
    frozen = [
        name
        for name in start
        if not name.endswith(SCALE) and any(fnmatchcase(name, pattern) for pattern in freeze)
    ]
    for name in frozen:
        latent = start.pop(name)
        if name in grids:
            scale = fixed[name + SCALE]
            fixed[name] = grids.pop(name).values(jnp.asarray(latent), scale)
            start.pop(name + SCALE, None)
        else:
            fixed[name] = latent
    if not start:
        raise BadInput(
            "there is no float or quantized weight to train",
            about=model.graph.name or "model",
            remedy="look at --freeze" if frozen else "",
        )
    return Twin(model, copy, lowered, start, fixed, grids, activations)


def _replace(
    node: ir.Node,
    graph: ir.Graph,
    mine: Mapping[str, ir.Value],
    originals: Mapping[str, ir.Value],
    start: Parameters,
    fixed: Parameters,
    grids: dict[str, Grid],
    scales: bool,
    activations: Mapping[str, ir.Value],
) -> None:
    """Put a float initializer in the place of a DequantizeLinear of a constant."""
    codes, scale = node.inputs[0], node.inputs[1]
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    assert codes is not None
    stored, factors = weight(codes), weight(scale)
    if stored is None or factors is None:
        return
    assert scale is not None
    assert codes.dtype is not None
    ends = weight(zero) if zero is not None else None
    offsets = None if ends is None or not ends.astype(np.float32).any() else ends.astype(np.float32)
    plain = stored.astype(np.float32)
    wide = codes.dtype.bitwidth > 8
    grid = Grid(
        mine[codes.name or ""],
        mine[scale.name or ""],
        offsets,
        int(attribute(node, "axis", 1)) % max(plain.ndim, 1),
        int(attribute(node, "block_size", 0)),
        *((-(2.0**31), 2.0**31) if wide else (float(plain.min()), float(plain.max()))),
        len(scale.uses()) == 1 and not _on_integers(node),
        _followed(node, activations) if wide else "",
    )
    centred = plain if offsets is None else plain - np.asarray(grid._spread(offsets, plain.shape))
    latent = centred * np.asarray(grid._spread(factors, plain.shape))
    if not wide:
        latent = _nearest(latent, codes.name or "", originals, grid, factors)
    result = node.outputs[0]
    value = initializer(graph, latent.astype(np.float32), codes.name or "weight")
    result.replace_all_uses_with(value, replace_graph_outputs=True)
    assert node.graph is not None
    node.graph.remove(node, safe=True)
    name = value.name or ""
    start[name] = jnp.asarray(latent, "float32")
    grids[name] = grid
    fixed[name + SCALE] = jnp.asarray(factors, "float32")
    if scales and grid.trains_scale and not wide:
        start[name + SCALE] = jnp.zeros(factors.shape, "float32")


def _activation_scales(model: ir.Model, mine: Mapping[str, ir.Value]) -> dict[str, ir.Value]:
    """Scales of activations that may learn: every integer bias behind one can follow it."""
    found: dict[str, ir.Value] = {}
    fixed: set[str] = set()
    for node in model.graph.all_nodes():
        scale = node.inputs[1] if len(node.inputs) > 1 else None
        name = scale.name or "" if scale is not None else ""
        quantizes = node.op_type == "QuantizeLinear" and not node.domain
        if quantizes and name in model.graph.initializers:
            found[name] = mine[name]
        if node.op_type != "DequantizeLinear" or node.domain or node.inputs[0] is None:
            continue
        if not is_constant(node.inputs[0]) or node.inputs[0].dtype != ir.DataType.INT32:
            continue
        sources = _sources(node)
        if len(sources) > 1 or scale is None or len(scale.uses()) > 1:
            fixed |= sources
    return {name: value for name, value in found.items() if name not in fixed}


def _let_in(graph: ir.Graph, name: str, start: Parameters, fixed: Parameters) -> None:
    """Make a stored scale an input: as a constant it would be compiled in."""
    value = graph.initializers.pop(name)
    stored = weight(value)
    assert stored is not None
    value.const_value = None
    graph.inputs.append(value)
    fixed[name + SCALE] = jnp.asarray(stored, "float32")
    start[name + SCALE] = jnp.zeros(stored.shape, "float32")


def _sources(node: ir.Node) -> set[str]:
    """The scales of the activations that the products with a stored bias read."""
    found = set()
    for reader, index in node.outputs[0].uses():
        maker = producer(reader.inputs[0], "DequantizeLinear") if index == 2 else None
        scale = maker.inputs[1] if maker is not None else None
        found.add(scale.name or "" if scale is not None else "")
    return found


def _followed(node: ir.Node, activations: Mapping[str, ir.Value]) -> str:
    """The scale that an integer bias goes with, if that learns."""
    sources = _sources(node) & set(activations)
    return next(iter(sources), "")


def _on_integers(node: ir.Node) -> bool:
    """Whether a product of the weight has a quantized activation too: its bias is then stored on a
    grid that both scales make, and engines do not look at another.
    """
    first = [reader.inputs[0] for reader, index in node.outputs[0].uses() if index]
    return any(producer(value, "DequantizeLinear") is not None for value in first)


def _nearest(
    centre: Array, name: str, originals: Mapping[str, ir.Value], grid: Grid, scale: Array
) -> Array:
    """The point of each code's cell that is nearest to the weight of the source model.

    A code that was chosen against rounding (GPTQ does so) starts from the middle of its cell: at
    the edge, the first update would undo the choice.
    """
    stem = name.removesuffix("_quantized")
    found = weight(originals.get(stem))
    if found is None:
        return centre
    for array in (found, found.T):
        if array.shape == centre.shape:
            step = np.abs(np.asarray(grid._spread(scale, centre.shape)))
            off = array.astype(np.float32) - centre
            rounded = np.abs(off) <= np.float32(0.501) * step
            reach = np.float32(0.49) * step
            return np.asarray(centre + np.where(rounded, np.clip(off, -reach, reach), 0))
    return centre


def tap(model: ir.Model, taps: Mapping[str, str]) -> None:
    """Make values of a graph its outputs as well.

    Args:
        taps: Names of values, or of Attention and Softmax nodes (for their attention maps), by
            the name that the output is to have.
    """
    values = ir.convenience.create_value_mapping(model.graph, include_subgraphs=False)
    nodes = {node.name: node for node in model.graph}
    for output, name in taps.items():
        node, value = nodes.get(name), values.get(name)
        if node is not None and node.op_type == "Attention" and node.domain == "":
            value = _attention_map(node)
        elif node is not None:
            value = node.outputs[0]
        if value is None:
            close = [known for known in (*nodes, *values) if known and name in known][:5]
            raise BadInput(
                f"no value or node named {name!r}",
                about="--hidden or --attention",
                remedy=f"near it: {', '.join(close)}" if close else "see: trivium inspect",
            )
        identity = ir.node("Identity", [value])
        made = identity.outputs[0]
        made.name, made.shape, made.type = output, value.shape, value.type
        model.graph.append(identity)
        model.graph.outputs.append(made)


def expose_logits(model: ir.Model) -> None:
    """Return what a Softmax at the end reads instead of its probabilities, under the same name.

    Losses want logits; the graph that is written keeps its Softmax. A logarithm of probabilities
    is as good as logits, so LogSoftmax stays.
    """
    for index, value in enumerate(model.graph.outputs):
        maker, last = value.producer(), value
        while maker is not None and maker.op_type in (
            "Identity", "Cast", "DequantizeLinear", "QuantizeLinear",
        ):  # fmt: skip
            if maker.inputs[0] is None:
                break
            last = maker.inputs[0]
            maker = last.producer()
        if maker is None or maker.op_type != "Softmax" or maker.domain or maker.inputs[0] is None:
            continue
        identity = ir.node("Identity", [maker.inputs[0]])
        made = identity.outputs[0]
        model.graph.append(identity)
        made.name, value.name = value.name, f"{value.name}.probabilities"
        made.shape, made.type = value.shape, value.type
        model.graph.outputs[index] = made


def _attention_map(node: ir.Node) -> ir.Value:
    """The probabilities of an Attention node, as its fourth output."""
    if len(node.outputs) < 4:
        node.resize_outputs(4)
    for index, value in enumerate(node.outputs):
        value.name = value.name or f"{node.name}.output_{index}"
    node.attributes["qk_matmul_output_mode"] = ir.AttrInt64("qk_matmul_output_mode", 3)
    return node.outputs[3]


def _store(value: ir.Value, array: Array) -> None:
    """Replace the content of an initializer, in the dtype it has."""
    old = value.const_value
    assert old is not None
    value.const_value = ir.tensor(array.astype(old.dtype.numpy()), dtype=old.dtype, name=old.name)
