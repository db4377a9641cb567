"""Quantize activations and weights to 8-bit integers with ranges found on representative inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx_ir as ir

from trivium.compiler.errors import BadInput
from trivium.compiler.passing import (
    Pass,
    decline,
    from_context,
    is_constant,
    is_op,
    option,
    sketching,
)
from trivium.compiler.types import Preserves
from trivium.passes.quantization import layers, linear
from trivium.passes.quantization.calibration import Calibrated, calibrate
from trivium.passes.quantization.choosing import least_error
from trivium.passes.quantization.insertion import Inserter, bias_use
from trivium.passes.quantization.observers import (
    OBSERVERS,
    WAYS,
    Both,
    ChannelMeans,
    Observer,
    ways,
)
from trivium.passes.quantization.outlining import Outliner
from trivium.passes.quantization.placement import DEFAULT, PLACEMENTS, Placement
from trivium.passes.quantization.planning import Plan, plan

if TYPE_CHECKING:
    from trivium.compiler.backend import Tensors


Array = np.ndarray[Any, np.dtype[Any]]
Spans = tuple[tuple[float, float], ...]
"""The ranges of one tensor to choose from."""

_TYPES = ("auto", "int8", "uint8", *linear.FLOATS)
_WEIGHT_BITS = (2, 3, 4, 5, 6, 7, 8)


@dataclass(frozen=True)
class QuantizeStatic(Pass):
    """Put Q/DQ pairs where the target's engine turns them into integer kernels.

    Where that is, is data: see `trivium.passes.quantization.placement`. The placement is that of
    the backend compiled for unless ``policy`` names one. Weights are int8, symmetric, by default
    with a scale for each output channel; activations have one scale each, from calibration data
    that is run through the graph once or a few times while only statistics are kept. The model's
    own inputs and outputs keep their whole range whatever the method. ``auto`` tries ``mse``,
    ``minmax`` and ``percentile`` and takes what keeps the outputs best on some of the data (of data
    that can be read only once it takes ``mse``).

    Left alone: what is quantized already (so that running twice changes nothing), subgraphs,
    weights with NaN or infinity, tensors that the calibration data never reaches or that hold NaN
    there, and what an engine has no integer kernel for.
    """

    name: ClassVar[str] = "quantize-static"
    preserves: ClassVar[Preserves] = "lossy"
    leaving: ClassVar[tuple[str, ...]] = ("op_types", "exclude", "precision")

    method: str = option(
        "entropy",
        "How a tensor's range is chosen from its values",
        choices=tuple(sorted(OBSERVERS)),
    )
    policy: str = option(
        "auto", "Whose placement of Q/DQ to use", choices=("auto", *sorted(PLACEMENTS))
    )
    activation: str = option("auto", "Type of the activations", choices=_TYPES)
    symmetric: str = option(
        "auto", "Whether activations are symmetric about zero", choices=("auto", "yes", "no")
    )
    per_channel: bool = option(True, "Whether each output channel of a weight has its own scale")
    weight_bits: int = option(
        8,
        "Bits of a weight; 7 avoids saturation on x86 without VNNI",
        choices=_WEIGHT_BITS,
    )
    bias_correction: bool = option(
        False, "Whether biases make up for what rounded weights add to the mean of the outputs"
    )
    op_types: tuple[str, ...] = option((), "Operators to quantize; none = all that the engine has")
    exclude: tuple[str, ...] = option((), layers.EXCLUDE)
    precision: tuple[str, ...] = option(
        (),
        "Layers that differ: NAME=float, or NAME=int4 for its weight; the last match counts",
    )

    state: str = option("", "File that keeps the statistics: a killed calibration goes on from it")

    backend: str | None = from_context("backend")
    calibration: Iterable[Tensors] | None = from_context("calibration")

    def __post_init__(self) -> None:
        self._choices()
        if self.activation not in linear.FLOATS:
            return
        contradiction = {
            "symmetric = 'no'": self.symmetric == "no",
            f"weight_bits = {self.weight_bits}": self.weight_bits != 8,
            f"method = {self.method!r}": self.method in ("auto", "entropy", "mse"),
            "an integer precision": any(one.bits is not None for one in self._choices()),
        }
        for option_given, given in contradiction.items():
            if given:
                raise ValueError(
                    f"{option_given} contradicts activation = {self.activation!r}, whose codes are "
                    "floats, symmetric and unevenly spaced"
                )

    def run(self, model: ir.Model) -> bool:
        layers.note_unmatched(model, self.exclude, self._choices())
        placement = self._placement()
        made = plan(model.graph, placement, self._chosen)
        if not made.tensors:
            return False
        ranges, means = self._learn(model, made, placement)
        _forget_unknown(made, ranges)
        if not made.tensors:
            return False
        spans = {root: span[0] for root, span in ranges.items()}
        if self.method == "auto" and not sketching():
            spans = self._chosen_spans(model, ranges, means, placement)
        self._inserter(model.graph, placement, means).insert(made, spans)
        return True

    def _chosen_spans(
        self,
        model: ir.Model,
        ranges: Mapping[ir.Value, Spans],
        means: Mapping[ir.Node, Array],
        placement: Placement,
    ) -> dict[ir.Value, tuple[float, float]]:
        """Try each way to choose ranges on a copy of the model."""
        named = {root.name: spans for root, spans in ranges.items()}
        places = {node: index for index, node in enumerate(model.graph)}
        at = {places[node]: mean for node, mean in means.items()}

        def quantized(way: int, copy: ir.Model) -> None:
            nodes = list(copy.graph)
            made = plan(copy.graph, placement, self._chosen)
            roots = {made.root(value) for value in made.tensors}
            found = {root: named[root.name] for root in roots if root.name in named}
            _forget_unknown(made, found)
            spans = {root: some[way] for root, some in found.items()}
            own = {nodes[index]: mean for index, mean in at.items()}
            self._inserter(copy.graph, placement, own).insert(made, spans)

        feeds = self.calibration
        if feeds is None or iter(feeds) is feeds:
            way = 0
        else:
            way = least_error(model, feeds, [partial(quantized, index) for index in range(WAYS)])
        return {root: spans[way] for root, spans in ranges.items()}

    def placed_for(self) -> str:
        """The engine whose placement is taken."""
        if self.policy != "auto":
            return self.policy
        return self.backend if self.backend in PLACEMENTS else DEFAULT

    def _placement(self) -> Placement:
        placement = PLACEMENTS[self.placed_for()]
        if self.activation in linear.FLOATS:
            # No engine takes biases but in float beside products of floats.
            return replace(placement, symmetric=True, integer_bias=False)
        return placement

    def _chosen(self, node: ir.Node) -> bool:
        if self.op_types and node.op_type not in self.op_types:
            return False
        choice = layers.chosen(node, self._choices())
        wanted = choice is None or choice.bits is not None
        return wanted and not layers.excluded(node, self.exclude)

    def _choices(self) -> tuple[layers.Choice, ...]:
        return layers.parse(self.precision, bits=_WEIGHT_BITS)

    def _weight_grid(self, node: ir.Node) -> linear.Grid:
        if self.activation in linear.FLOATS:
            return linear.grid(self.activation)
        choice = layers.chosen(node, self._choices())
        bits = choice.bits if choice is not None else None
        return linear.grid("int8", bits or self.weight_bits)

    def _grid(self, placement: Placement) -> tuple[linear.Grid, bool]:
        dtype = placement.activation if self.activation == "auto" else self.activation
        symmetric = placement.symmetric if self.symmetric == "auto" else self.symmetric == "yes"
        return (linear.grid(dtype) if symmetric else linear.full(dtype)), symmetric

    def _learn(
        self, model: ir.Model, made: Plan, placement: Placement
    ) -> tuple[dict[ir.Value, Spans], dict[ir.Node, Array]]:
        """The range of every root that the calibration reached, and what biases have to know."""
        ranges: dict[ir.Value, Spans] = {}
        observed = []
        for value in made.tensors:
            if value in made.derived:
                continue
            maker = value.producer()
            known = placement.fixed.get(maker.op_type) if maker is not None else None
            if known is not None:
                ranges[made.root(value)] = (known,) * WAYS
            else:
                observed.append(value)
        if sketching():
            ranges.update({made.root(value): ((-1.0, 1.0),) * WAYS for value in observed})
            return ranges, {}
        averaged = self._averaged(made)
        if not observed and not averaged:
            return ranges, {}
        seen = self._calibrate(model, observed, averaged, placement)
        for value in observed:
            observer = seen.observers[value]
            if value in seen.spoiled:
                decline(value, "holds NaN or infinity on the calibration data")
            elif not observer.seen:
                decline(value, "the calibration data never reaches it")
            else:
                root = made.root(value)
                before = ranges.get(root, ((0.0, 0.0),) * WAYS)
                ranges[root] = tuple(map(_joined, before, ways(observer)))
        means = {}
        for node, value in averaged.items():
            learner = seen.observers[value]
            average = learner.second if isinstance(learner, Both) else learner
            if isinstance(average, ChannelMeans) and average.seen and value not in seen.spoiled:
                means[node] = average.mean
        return ranges, means

    def _averaged(self, made: Plan) -> dict[ir.Node, ir.Value]:
        """Layers with a bias to be corrected, and their inputs."""
        found = {}
        for node, position in made.weights if self.bias_correction else ():
            value = node.inputs[0]
            if position != 1 or value is None or is_constant(value):
                continue
            if is_op(node, "Conv", "Gemm") or bias_use(node) is not None:
                found[node] = value
        return found

    def _calibrate(
        self,
        model: ir.Model,
        values: list[ir.Value],
        averaged: dict[ir.Node, ir.Value],
        placement: Placement,
    ) -> Calibrated:
        if self.calibration is None:
            raise BadInput(
                "quantization needs representative inputs",
                about=self.name,
                remedy="give them with --calib FILE.npz, or use the recipe int8-weights",
            )
        count = self._grid(placement)[0].count
        axes = {value: 1 if node.op_type == "Conv" else -1 for node, value in averaged.items()}
        ranged = set(values)

        def make(value: ir.Value) -> Observer:
            if value not in ranged:
                return ChannelMeans(axes[value])
            # What the caller hands in or reads is not a tail to be clipped: two classes whose
            # scores are both clipped have the same score.
            outside = value.is_graph_input() or value.is_graph_output()
            found = OBSERVERS["minmax" if outside else self.method](count)
            return Both(found, ChannelMeans(axes[value])) if value in axes else found

        state = Path(self.state) if self.state else None
        everything = list(dict.fromkeys([*values, *axes]))
        seen = calibrate(model, everything, self.calibration, make, state=state)
        if seen.samples == 1:
            decline(
                model.graph.inputs[0],
                "calibrated on a single sample: ranges that other inputs need may be cut off",
            )
        return seen

    def _inserter(
        self, graph: ir.Graph, placement: Placement, means: dict[ir.Node, Array]
    ) -> Inserter:
        activations, symmetric = self._grid(placement)
        kind = Outliner if sketching() else Inserter
        return kind(graph, activations, symmetric, self._weight_grid, self.per_channel, means)


def _joined(one: tuple[float, float], other: tuple[float, float]) -> tuple[float, float]:
    return min(one[0], other[0]), max(one[1], other[1])


def _forget_unknown(made: Plan, ranges: Mapping[ir.Value, Any]) -> None:
    """Drop activations without a range, and the weights of operators that read them."""
    lost = {value for value in made.tensors if made.root(value) not in ranges}
    if not lost:
        return
    for value in lost:
        del made.tensors[value]
    for uses in (made.weights, made.constants, made.biases):
        uses[:] = [use for use in uses if not lost & set(use[0].inputs)]
