"""Store the weights of matrix products as blocks of 2- to 8-bit integers; compute stays float."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx_ir as ir

from trivium.compiler.errors import BadInput
from trivium.compiler.passing import (
    Pass,
    decline,
    dims,
    from_context,
    is_constant,
    is_op,
    option,
    sketching,
)
from trivium.compiler.samples import seeded
from trivium.compiler.types import Preserves, Workload
from trivium.passes.quantization import (
    activation_aware,
    blas,
    block_sizes,
    blocks,
    gptq,
    layers,
    storing,
)
from trivium.passes.quantization.blocks import Blocks, Form
from trivium.passes.quantization.moments import Moment
from trivium.passes.quantization.walk import Walk

if TYPE_CHECKING:
    from trivium.compiler.backend import Tensors

Array = np.ndarray[Any, np.dtype[Any]]

_BITS = (2, 3, 4, 8)
_BLOCKS = (16, 32, 64, 128, 256, 512)
_USUAL_BLOCK = 128
_UNSEEN = "its input is unknown or NaN on the calibration data: rounded without it"
_CALIBRATED = ("gptq", "awq")

_WINDOWS, _TOKENS = 32, 256
"""How many samples of how many tokens are drawn where none are given."""

_BUDGET = 2 << 20
"""Bytes of tensors that one run may return; attention makes several times as many inside."""

_POSITIVE = ("fpga", "tensorrt")
"""Backends whose engines take no negative scale."""

_STREAMED_BYTES = 4 << 20
"""From this size on, a weight that lies in a file is rounded to the nearest when it is written."""


@dataclass(frozen=True)
class Weight:
    """A weight to be quantized: where it is stored, what reads it, and how it will be stored."""

    value: ir.Value
    readers: tuple[ir.Node, ...]
    form: Form

    @property
    def elements(self) -> int:
        return int(np.prod([size or 0 for size in dims(self.value) or ()]))


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Replace the weight of MatMul and Gemm by a DequantizeLinear of blocks.

    A block is ``block_size`` values along the axis that the product sums over, with a scale of its
    own (and a zero point if asymmetric). This is the form that ONNX Runtime turns into
    MatMulNBits and TensorRT into its weight-only kernels: axis 0 of a [K, N] weight; Gemm's
    transposed weights are stored the other way round for it.

    ``rtn`` rounds to the nearest code of the textbook's grid; ``signed`` uses the lowest code too,
    for the largest value of a block, by scales that may be negative (TensorRT takes none: there it
    is ``rtn``); ``hqq`` fits the grids to all but the outliers; none of them takes data. ``gptq``
    and ``awq`` take calibration data, which is run through the graph segment by segment. GPTQ lets
    the weights that are not yet rounded make up for those that are, and later layers for earlier
    ones; AWQ first enlarges the weights of the channels that are large. For a model that reads
    nothing but tokens, random ones stand in for missing data.

    One weight is in memory at a time. Large ones that lie in a file are rounded to the nearest when
    the model is written, in stripes; the other methods' results are kept in memory or in a file.
    Codes of 2 and 3 bits are stored in 4, so that a file of them is no smaller.

    Left alone: weights smaller than ``min_elements``, which gain nothing; those with NaN or
    infinity; weights that something besides MatMul and Gemm reads, since they would be stored
    twice.
    """

    name: ClassVar[str] = "quantize-weights"
    preserves: ClassVar[Preserves] = "lossy"

    method: str = option(
        "rtn", "How weights are rounded", choices=("awq", "gptq", "hqq", "rtn", "signed")
    )
    bits: int = option(4, "Bits of a weight", choices=_BITS)
    block_size: int = option(
        128,
        "Values that share a scale; 0 = for each layer by its error against its time",
        choices=(0, *_BLOCKS),
    )
    symmetric: bool = option(True, "Whether blocks are symmetric about zero (no zero points)")
    min_elements: int = option(4096, "Weights with fewer elements stay as they are")
    exclude: tuple[str, ...] = option((), layers.EXCLUDE)
    precision: tuple[str, ...] = option(
        (), "Layers that differ: NAME=float, NAME=int8, NAME=int4/64; the last match counts"
    )

    backend: str | None = from_context("backend")
    calibration: Iterable[Tensors] | None = from_context("calibration")
    seed: int | None = from_context("seed")

    def __post_init__(self) -> None:
        self._choices()

    def placed_for(self) -> str:
        """Which codes the engine needs, where that is left to it."""
        return "positive" if self.backend in _POSITIVE else "any"

    def run(self, model: ir.Model) -> bool:
        layers.note_unmatched(model, self.exclude, self._choices())
        order = {node: index for index, node in enumerate(model.graph)}
        if sketching():
            return self._outlined(model, order)
        found = self._sized(list(self._weights(model.graph)))
        if not found:
            return False
        large = sum(4 * one.elements for one in found) > storing.KEPT
        store = _Store(model, order, large)
        match self.method:
            case "rtn":
                return store.all(found, blocks.nearest)
            case "signed":
                positive = self.backend in _POSITIVE
                return store.all(found, blocks.nearest if positive else blocks.signed)
            case "hqq":
                return store.all(found, blocks.half_quadratic)
            case _:
                learn = self._by_gptq if self.method == "gptq" else self._by_awq
                sizes = [size or 0 for one in found for size in dims(one.value) or ()]
                small = max(sizes) <= blas.SMALL
                with blas.in_one_thread() if small else nullcontext():
                    return learn(model, found, store, self._feeds(model))

    def _outlined(self, model: ir.Model, order: dict[ir.Node, int]) -> bool:
        """Put the form of quantized weights where they would stand; nothing is read."""
        found = list(self._weights(model.graph))
        store = _Store(model, order, large=False)
        for one in found:
            form = replace(one.form, block_size=one.form.block_size or _USUAL_BLOCK)
            reader = one.readers[0]
            store.put(replace(one, form=form), storing.outlined(one.value, reader, form))
        return bool(found)

    # --- what to quantize ------------------------------------------------------------------------

    def _weights(self, graph: ir.Graph) -> Iterator[Weight]:
        for value in list(graph.initializers.values()):
            readers = [node for node, index in value.uses() if self._reads(node, index)]
            if readers and self._fits(value, readers):
                yield Weight(value, tuple(readers), self._form(readers[0]))

    def _reads(self, node: ir.Node, index: int) -> bool:
        if index != 1 or not is_op(node, "MatMul", "Gemm"):
            return False
        choice = layers.chosen(node, self._choices())
        wanted = choice is None or choice.bits is not None
        return wanted and not layers.excluded(node, self.exclude)

    def _choices(self) -> tuple[layers.Choice, ...]:
        return layers.parse(self.precision, bits=_BITS, blocks=_BLOCKS)

    def _form(self, node: ir.Node) -> Form:
        choice = layers.chosen(node, self._choices())
        if choice is None:
            return Form(self.bits, self.block_size, self.symmetric)
        bits, size = choice.bits or self.bits, choice.block_size or self.block_size
        return Form(bits, size, self.symmetric)

    def _fits(self, value: ir.Value, readers: list[ir.Node]) -> bool:
        shape = dims(value)
        if not is_constant(value) or value.dtype != ir.DataType.FLOAT or shape is None:
            return False
        if len(shape) != 2:
            return decline(value, f"has {len(shape)} dimensions; blocks are made of matrices")
        if np.prod([size or 0 for size in shape]) < self.min_elements:
            return False
        if len(value.uses()) != len(readers) or value.is_graph_output():
            return decline(value, "something besides the products reads it")
        if len({storing.transposed(node) for node in readers}) > 1:
            return decline(value, "one product reads it transposed and another does not")
        return True

    def _sized(self, found: list[Weight]) -> list[Weight]:
        """Choose block sizes where they are left open."""
        open_ones = [one for one in found if not one.form.block_size]
        if not open_ones:
            return found
        errors = []
        for one in open_ones:
            matrix = storing.matrix(one.value, one.readers[0])
            finite = storing.nonfinite(matrix) is None
            errors.append(
                {
                    size: block_sizes.error(matrix, replace(one.form, block_size=size))
                    if finite
                    else 0.0
                    for size in block_sizes.TIME
                }
            )
        sizes = block_sizes.choose(errors, [one.elements for one in open_ones])
        made = {
            one.value: replace(one, form=replace(one.form, block_size=size))
            for one, size in zip(open_ones, sizes, strict=True)
        }
        return [made.get(one.value, one) for one in found]

    # --- with data -------------------------------------------------------------------------------

    def _feeds(self, model: ir.Model) -> Iterable[Tensors]:
        """What to calibrate on: of a model of tokens any will do, if none are given."""
        if self.calibration is not None:
            return self.calibration
        if not _reads_tokens(model):
            raise BadInput(
                f"{self.method} needs representative inputs",
                about=self.name,
                remedy="give them with --calib, or use method = 'rtn' or 'hqq'",
            )
        decline(model.graph.inputs[0], "no calibration data: random tokens in their place")
        seed = self.seed if self.seed is not None else 0
        return seeded(model, Workload(), count=_WINDOWS, seed=seed, size=_TOKENS)

    def _by_gptq(
        self, model: ir.Model, found: list[Weight], store: _Store, feeds: Iterable[Tensors]
    ) -> bool:
        """Quantize a segment, then run it as it is now: later ones see what the errors make."""
        modified = False
        walk, at = self._walk(model, found, feeds)
        for segment in walk:
            here = [one for node in segment.nodes for one in at.get(node, ())]
            by_input: dict[ir.Value, list[Weight]] = {}
            for one in here:
                value = one.readers[0].inputs[0]
                assert value is not None
                by_input.setdefault(value, []).append(one)
            for value, group in by_input.items():
                moment = Moment()
                for (array,) in walk.run(segment, [value], keep=False):
                    moment.update(group[0].readers[0], array)
                for one in group:
                    modified |= store.one(one, _rounding(one, moment))
        rest = [one for one in found if one.value.uses()]
        return store.all(rest, blocks.searched) or modified

    def _by_awq(
        self, model: ir.Model, found: list[Weight], store: _Store, feeds: Iterable[Tensors]
    ) -> bool:
        """Learn the factors on the float graph, then scale, then round."""
        walk, at = self._walk(model, found, feeds)
        wanted = {node: one.form for one in found for node in one.readers}
        sites = activation_aware.sites(model.graph, wanted)
        importance: dict[ir.Value, Array] = {}
        factors: dict[ir.Value, Array] = {}
        for segment in walk:
            here = [one for node in segment.nodes for one in at.get(node, ())]
            for value in dict.fromkeys(one.readers[0].inputs[0] for one in here):
                moment = Moment()
                assert value is not None
                node = next(one.readers[0] for one in here if one.readers[0].inputs[0] is value)
                for (array,) in walk.run(segment, [value], keep=False):
                    moment.update(node, array)
                if moment.total is None or moment.spoiled:
                    decline(value, _UNSEEN)
                    continue
                importance[value] = np.diag(moment.matrix).copy()
                if value in sites:
                    factor = activation_aware.factors(sites[value], moment, wanted)
                    if not (factor == 1).all():
                        factors[value] = factor
        for value, factor in factors.items():
            sites[value].scale(model.graph, factor)
            importance[value] = importance[value] / np.square(factor)
        modified = bool(factors)
        # Scaled weights are other constants than those that were found.
        for one in self._sized(list(self._weights(model.graph))):
            value = one.readers[0].inputs[0]
            weights = importance.get(value) if value is not None else None
            modified |= store.one(one, partial(blocks.searched, importance=weights))
        return modified

    def _walk(
        self, model: ir.Model, found: list[Weight], feeds: Iterable[Tensors]
    ) -> tuple[Walk, dict[ir.Node, list[Weight]]]:
        """A walk with a segment for each input of weights; the weights by their first reader."""
        graph = model.graph
        at: dict[ir.Node, list[Weight]] = {}
        first: dict[ir.Value, ir.Node] = {}
        order = {node: index for index, node in enumerate(graph)}
        for one in found:
            inside = [node for node in one.readers if node in order]
            if not inside:
                decline(one.value, "it is read in a body only, where no data is seen")
                continue
            node = min(inside, key=order.__getitem__)
            at.setdefault(node, []).append(replace(one, readers=(node, *_others(one, node))))
            value = node.inputs[0]
            assert value is not None
            first[value] = min(first.get(value, node), node, key=order.__getitem__)
        observed = list(first)
        return Walk(model, feeds, observed, cuts=set(first.values()), budget=_BUDGET), at


def _reads_tokens(model: ir.Model) -> bool:
    """Whether all inputs are integers, one of them the rows to take from a stored table."""
    inputs = [value for value in model.graph.inputs if not value.is_initializer()]
    tables = [
        node
        for value in inputs
        for node, index in value.uses()
        if is_op(node, "Gather") and index == 1 and is_constant(node.inputs[0])
    ]
    whole = all(value.dtype is not None and value.dtype.is_integer() for value in inputs)
    return bool(tables) and whole


def _others(one: Weight, node: ir.Node) -> tuple[ir.Node, ...]:
    return tuple(other for other in one.readers if other is not node)


def _rounding(one: Weight, moment: Moment) -> Callable[[Array, Form], Blocks]:
    if moment.total is None or moment.spoiled:
        decline(one.value, _UNSEEN)
        return blocks.searched
    return partial(gptq.quantize, moment=moment.matrix)


@dataclass
class _Store:
    """Quantizes weights of a model, in the way that its size asks for."""

    model: ir.Model
    order: dict[ir.Node, int]
    large: bool

    def all(self, found: list[Weight], quantize: Callable[[Array, Form], Blocks]) -> bool:
        """Quantize without data: that of a large model is put off until it is written."""
        modified = False
        deferred = storing.Deferred()
        for one in found:
            tensor = one.value.const_value
            assert tensor is not None
            filed = isinstance(tensor, (ir.ExternalTensor, ir.LazyTensor))
            rounds = quantize in (blocks.nearest, blocks.signed)
            if rounds and filed and tensor.nbytes >= _STREAMED_BYTES:
                signed = quantize is blocks.signed
                self.put(one, storing.streamed(one.value, one.readers[0], one.form, signed=signed))
                modified = True
            elif self.large and filed:
                self.put(one, deferred.parts(one.value, one.readers[0], one.form, quantize))
                modified = True
            else:
                modified |= self.one(one, quantize)
        return modified

    def one(self, one: Weight, quantize: Callable[[Array, Form], Blocks]) -> bool:
        """Quantize one weight now."""
        matrix = storing.matrix(one.value, one.readers[0])
        if (problem := storing.nonfinite(matrix)) is not None:
            return decline(one.value, problem)
        made = quantize(matrix, one.form)
        self.put(one, storing.spilled(self.model, made) if self.large else storing.eager(made))
        return True

    def put(self, one: Weight, parts: list[ir.TensorProtocol]) -> None:
        storing.replace(self.model.graph, one.value, one.readers, one.form, parts, self.order)
