"""Quantize activations and weights to 8-bit integers with ranges found on representative inputs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import onnx_ir as ir

from trivium.compiler.errors import BadInput
from trivium.compiler.passing import Pass, decline, from_context, option, sketching
from trivium.compiler.types import Preserves
from trivium.passes.quantization import layers, linear
from trivium.passes.quantization.calibration import Calibrated, calibrate
from trivium.passes.quantization.insertion import Inserter
from trivium.passes.quantization.observers import OBSERVERS, Observer
from trivium.passes.quantization.outlining import Outliner
from trivium.passes.quantization.placement import DEFAULT, PLACEMENTS, Placement
from trivium.passes.quantization.planning import Plan, plan

if TYPE_CHECKING:
    from trivium.compiler.backend import Tensors


_WEIGHT_BITS = (2, 3, 4, 5, 6, 7, 8)


@dataclass(frozen=True)
class QuantizeStatic(Pass):
    """Put Q/DQ pairs where the target's engine turns them into integer kernels.

    Where that is, is data: see `trivium.passes.quantization.placement`. The placement is that of
    the backend compiled for unless ``policy`` names one. Weights are int8, symmetric, by default
    with a scale for each output channel; activations have one scale each, from calibration data
    that is run through the graph once or a few times while only statistics are kept. The model's
    own inputs and outputs keep their whole range whatever the method.

    Left alone: what is quantized already (so that running twice changes nothing), subgraphs,
    weights with NaN or infinity, tensors that the calibration data never reaches or that hold NaN
    there, and what an engine has no integer kernel for.
    """

    name: ClassVar[str] = "quantize-static"
    preserves: ClassVar[Preserves] = "lossy"

    method: str = option(
        "entropy",
        "How a tensor's range is chosen from its values",
        choices=tuple(sorted(OBSERVERS)),
    )
    policy: str = option(
        "auto", "Whose placement of Q/DQ to use", choices=("auto", *sorted(PLACEMENTS))
    )
    activation: str = option("auto", "Type of the activations", choices=("auto", "int8", "uint8"))
    symmetric: str = option(
        "auto", "Whether activations are symmetric about zero", choices=("auto", "yes", "no")
    )
    per_channel: bool = option(True, "Whether each output channel of a weight has its own scale")
    weight_bits: int = option(
        8,
        "Bits of a weight; 7 avoids saturation on x86 without VNNI",
        choices=_WEIGHT_BITS,
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

    def run(self, model: ir.Model) -> bool:
        layers.note_unmatched(model, self.exclude, self._choices())
        placement = self._placement()
        made = plan(model.graph, placement, self._chosen)
        if not made.tensors:
            return False
        ranges = self._ranges(model, made, placement)
        _forget_unknown(made, ranges)
        if not made.tensors:
            return False
        self._inserter(model.graph, placement).insert(made, ranges)
        return True

    def _placement(self) -> Placement:
        name = self.policy
        if name == "auto":
            name = self.backend if self.backend in PLACEMENTS else DEFAULT
        return PLACEMENTS[name]

    def _chosen(self, node: ir.Node) -> bool:
        if self.op_types and node.op_type not in self.op_types:
            return False
        choice = layers.chosen(node, self._choices())
        wanted = choice is None or choice.bits is not None
        return wanted and not layers.excluded(node, self.exclude)

    def _choices(self) -> tuple[layers.Choice, ...]:
        return layers.parse(self.precision, bits=_WEIGHT_BITS)

    def _weight_grid(self, node: ir.Node) -> linear.Grid:
        choice = layers.chosen(node, self._choices())
        bits = choice.bits if choice is not None else None
        return linear.grid("int8", bits or self.weight_bits)

    def _grid(self, placement: Placement) -> tuple[linear.Grid, bool]:
        dtype = placement.activation if self.activation == "auto" else self.activation
        symmetric = placement.symmetric if self.symmetric == "auto" else self.symmetric == "yes"
        return (linear.grid(dtype) if symmetric else linear.full(dtype)), symmetric

    def _ranges(
        self, model: ir.Model, made: Plan, placement: Placement
    ) -> dict[ir.Value, tuple[float, float]]:
        """The range of every root that the calibration reached."""
        ranges: dict[ir.Value, tuple[float, float]] = {}
        observed = []
        for value in made.tensors:
            if value in made.derived:
                continue
            maker = value.producer()
            known = placement.fixed.get(maker.op_type) if maker is not None else None
            if known is not None:
                ranges[made.root(value)] = known
            else:
                observed.append(value)
        if sketching():
            ranges.update({made.root(value): (-1.0, 1.0) for value in observed})
            return ranges
        if not observed:
            return ranges
        seen = self._calibrate(model, observed, placement)
        for value, observer in seen.observers.items():
            if value in seen.spoiled:
                decline(value, "holds NaN or infinity on the calibration data")
            elif not observer.seen:
                decline(value, "the calibration data never reaches it")
            else:
                low, high = observer.range()
                root = made.root(value)
                before = ranges.get(root, (0.0, 0.0))
                ranges[root] = min(low, before[0]), max(high, before[1])
        return ranges

    def _calibrate(
        self, model: ir.Model, values: list[ir.Value], placement: Placement
    ) -> Calibrated:
        if self.calibration is None:
            raise BadInput(
                "quantization needs representative inputs",
                about=self.name,
                remedy="give them with --calib FILE.npz, or use the recipe int8-weights",
            )
        codes = self._grid(placement)[0]
        count = codes.high - codes.low + 1

        def make(value: ir.Value) -> Observer:
            # What the caller hands in or reads is not a tail to be clipped: two classes whose
            # scores are both clipped have the same score.
            outside = value.is_graph_input() or value.is_graph_output()
            return OBSERVERS["minmax" if outside else self.method](count)

        state = Path(self.state) if self.state else None
        seen = calibrate(model, values, self.calibration, make, state=state)
        if seen.samples == 1:
            decline(
                model.graph.inputs[0],
                "calibrated on a single sample: ranges that other inputs need may be cut off",
            )
        return seen

    def _inserter(self, graph: ir.Graph, placement: Placement) -> Inserter:
        activations, symmetric = self._grid(placement)
        kind = Outliner if sketching() else Inserter
        return kind(graph, activations, symmetric, self._weight_grid, self.per_channel)


def _forget_unknown(made: Plan, ranges: dict[ir.Value, tuple[float, float]]) -> None:
    """Drop activations without a range, and the weights of operators that read them."""
    lost = {value for value in made.tensors if made.root(value) not in ranges}
    if not lost:
        return
    for value in lost:
        del made.tensors[value]
    for uses in (made.weights, made.constants, made.biases):
        uses[:] = [use for use in uses if not lost & set(use[0].inputs)]
