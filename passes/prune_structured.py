"""Take whole channels, attention heads and neurons out of a graph, which gets smaller for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
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
    option,
    sketching,
)
from trivium.compiler.types import Preserves
from trivium.passes.coupling import rank
from trivium.passes.coupling.reconstruct import reconstruct
from trivium.passes.coupling.shrink import shrink
from trivium.passes.coupling.units import KINDS, Group, Units, find
from trivium.passes.moments import powers
from trivium.passes.quantization import layers
from trivium.passes.remove_dead_code import RemoveDeadCode

if TYPE_CHECKING:
    from trivium.compiler.backend import Tensors

Array = np.ndarray[Any, np.dtype[Any]]

DONE = "trivium.prune-structured"
"""Property of a model that says with which options it was pruned: half of a half is a quarter."""

_HALVINGS = 24


@dataclass(frozen=True)
class PruneStructured(Pass):
    """Remove the least important channels, heads and neurons, with all that depends on them.

    What is added, concatenated, split, reshaped or convolved by groups goes together; of each
    group of such units the least important are removed, so that weights, shapes, group counts and
    head counts really shrink and every engine is faster. The result is the original with what
    reads the units zeroed; with calibration data the products that read the other units make up
    for what goes, by least squares (`coupling.reconstruct`).

    Left alone: axes that a normalization or a Softmax runs over, that the caller sees (inputs,
    outputs, caches), that are picked or cut by place, or that an operator without a rule touches;
    and a model that was pruned with the same options before.
    """

    name: ClassVar[str] = "prune-structured"
    preserves: ClassVar[Preserves] = "lossy"

    ratio: float = option(0.5, "Share of the units to remove, 0 to 1")
    operations: float = option(
        0.0, "Share of the products' operations to leave, in place of a ratio; 0 goes by the ratio"
    )
    kinds: tuple[str, ...] = option(
        KINDS, "What to remove; streams are channels that residual layers are added to"
    )
    rank: str = option(
        "magnitude",
        "What units are ranked by: weights, what flows through them, or gradients (tune only)",
        choices=("magnitude", "activation", "taylor"),
    )
    scope: str = option(
        "layer", "Whether the share holds for each group or over all", choices=("layer", "global")
    )
    multiple: int = option(1, "Leave a multiple of this many units, which suits some engines")
    reconstruct: bool = option(
        True, "Whether the units that stay make up for those that go, on the calibration data"
    )
    max_inputs: int = option(
        8192, "Products that sum more inputs make up for nothing: the moment is its square"
    )
    exclude: tuple[str, ...] = option((), layers.EXCLUDE)

    calibration: Iterable[Tensors] | None = from_context("calibration")
    gradients: Callable[[ir.Model], Iterator[Mapping[str, Array]]] | None = from_context(
        "gradients"
    )

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise ValueError(f"ratio is {self.ratio:g}: give a share from 0 to below 1")
        if not 0 <= self.operations <= 1:
            raise ValueError(f"operations is {self.operations:g}: give a share from 0 to 1")
        unknown = set(self.kinds) - set(KINDS)
        if unknown:
            raise ValueError(f"kinds holds {', '.join(sorted(unknown))}")
        if self.multiple < 1:
            raise ValueError(f"multiple is {self.multiple}: give at least 1")

    def run(self, model: ir.Model) -> bool:
        signature = ", ".join(
            f"{f.name}={getattr(self, f.name)}" for f in fields(self) if "help" in f.metadata
        )
        if signature in model.metadata_props.get(DONE, "").split("; "):
            return False
        units = find(model.graph)
        for value, reason in units.pinned.items():
            if self._asked(value):
                decline(value, reason)
        groups = [group for group in units.groups if self._chosen(group)]
        if not groups:
            return False
        order = self._order(units, groups, self._scores(model, units, groups))
        removed = order(self._ratio(model.graph, units, order))
        if not removed:
            return False
        if self.reconstruct and self.calibration is not None and not sketching():
            reconstruct(model, units, removed, self.calibration, largest=self.max_inputs)
        shrink(units, removed)
        RemoveDeadCode()(model)  # constants that were replaced
        before = model.metadata_props.get(DONE)
        model.metadata_props[DONE] = f"{before}; {signature}" if before else signature
        return True

    def _asked(self, value: ir.Value) -> bool:
        """Whether one would expect a weight to be pruned: a product's, not excluded."""
        readers = [node for node, index in value.uses() if index == 1]
        products = [n for n in readers if n.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")]
        return bool(products) and not self._excluded(products)

    def _excluded(self, nodes: Iterable[ir.Node]) -> bool:
        return any(layers.excluded(node, self.exclude) for node in nodes)

    def _chosen(self, group: Group) -> bool:
        readers = [node for value, _ in group.weights for node, _ in value.uses()]
        wide = any(len(dims(value) or ()) > 1 for value, _ in group.weights)
        return group.kind in self.kinds and wide and not self._excluded(readers)

    def _scores(self, model: ir.Model, units: Units, groups: list[Group]) -> list[Array]:
        if sketching():
            return [np.zeros(len(group.labels)) for group in groups]
        if self.rank == "taylor":
            if self.gradients is None:
                raise BadInput(
                    "ranking by Taylor expansion needs gradients",
                    about=self.name,
                    remedy="run the recipe with trivium tune, which has them",
                )
            found = rank.by_taylor(units, groups, self.gradients(model))
            return [found[index] for index in range(len(groups))]
        if self.rank == "magnitude":
            return [rank.by_magnitude(units, group) for group in groups]
        places = {value: axis for group in groups for _, value, axis in rank.read_by(units, group)}
        seen = powers(model, list(places.items()), self.calibration, about=self.name)
        return [rank.by_activation(units, group, seen) for group in groups]

    def _order(
        self, units: Units, groups: list[Group], scores: list[Array]
    ) -> Callable[[float], set[int]]:
        """A function from a ratio to the labels that go."""
        ranked = [group.labels[np.argsort(s, kind="stable")] for group, s in zip(
            groups, scores, strict=True)]  # fmt: skip
        sizes = [len(group.labels) for group in groups]
        if self.scope == "layer":
            return lambda ratio: self._first(ranked, [int(ratio * size) for size in sizes])
        scaled = [s if self.rank == "taylor" else s / (s.mean() or 1.0) for s in scores]
        owner = np.concatenate([np.full(size, i) for i, size in enumerate(sizes)])
        ordered = owner[np.argsort(np.concatenate(scaled), kind="stable")]

        def chosen(ratio: float) -> set[int]:
            lost = ordered[: int(ratio * len(ordered))]
            return self._first(ranked, np.bincount(lost, minlength=len(groups)).tolist())

        return chosen

    def _first(self, ranked: list[Array], counts: list[int]) -> set[int]:
        """The first of each group, as far as enough of it stays."""
        removed: set[int] = set()
        for labels, count in zip(ranked, counts, strict=True):
            left = max(1, math.ceil((len(labels) - count) / self.multiple) * self.multiple)
            removed.update(labels[: max(0, len(labels) - left)].tolist())
        return removed

    def _ratio(self, graph: ir.Graph, units: Units, order: Callable[[float], set[int]]) -> float:
        """The ratio to remove: the one given, or the least that leaves few enough operations."""
        if not self.operations:
            return self.ratio
        work = _work(graph, units)
        whole = work(set())
        low, high = 0.0, 1.0
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            if work(order(middle)) > self.operations * whole:
                low = middle
            else:
                high = middle
        reached = work(order(high)) / whole
        if reached > self.operations:
            node = next(iter(graph))
            decline(node, f"{reached:.1%} of the operations cannot be removed")
        return high


def _work(graph: ir.Graph, units: Units) -> Callable[[set[int]], float]:
    """A function from removed labels to the multiplications of the products that are left.

    A dimension that is free counts as one everywhere: it scales all products alike.
    """
    products = []
    for node in graph:
        value = node.inputs[1] if len(node.inputs) > 1 else None
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul") or value is None:
            continue
        shape = dims(value)
        if not is_constant(value) or shape is None:
            continue
        out = dims(node.outputs[0]) or ()
        spatial = out[2:] if "Conv" in node.op_type else out[:-1]
        positions = math.prod(size or 1 for size in spatial)
        axes = [
            units.places(value, axis) if (value, axis) in known else np.full(size or 1, -1)
            for known in [set(units.elements.axes())]
            for axis, size in enumerate(shape)
        ]
        products.append((positions, axes))

    def work(removed: set[int]) -> float:
        gone = np.array(sorted(removed))
        return sum(
            positions * math.prod(float((~np.isin(labels, gone)).sum()) for labels in axes)
            for positions, axes in products
        )

    return work
