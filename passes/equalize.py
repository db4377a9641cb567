"""Cross-layer equalization: give the channels between two products ranges that are alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from trivium.compiler.passing import Pass, option, sketching
from trivium.compiler.types import Preserves
from trivium.passes.quantization import layers, scaling

_ROUNDS = 50

_CHANGE = 0.05
"""Factors nearer to one than this change nothing, so that the rounds come to an end."""


@dataclass(frozen=True)
class Equalize(Pass):
    """Rescale channels so that the weights before and after them have the same range.

    Nagel et al., 2019: ``s = sqrt(r1 / r2)`` for the ranges r1 of the weights that make a channel
    and r2 of those that read it. What the model computes stays the same; scales for whole tensors
    lose much less. Channels pass through ReLU and pooling, not through clips.

    Left alone: what something besides products reads, and channels without weights.
    """

    name: ClassVar[str] = "equalize"
    preserves: ClassVar[Preserves] = "numeric"

    exclude: tuple[str, ...] = option((), layers.EXCLUDE)

    def run(self, model: ir.Model) -> bool:
        layers.note_unmatched(model, self.exclude)
        if sketching():  # the numbers change, the graph does not
            return False
        modified = False
        for _ in range(_ROUNDS):
            changed = False
            for site in scaling.sites(model.graph):
                changed |= self._equalize(model.graph, site)
            modified |= changed
            if not changed:
                break
        return modified

    def _equalize(self, graph: ir.Graph, site: scaling.Site) -> bool:
        source = site.sources[0]
        nodes = [source.node, *(reader.node for reader in site.readers)]
        if source.node.op_type not in scaling.PRODUCTS:
            return False
        if any(layers.excluded(node, self.exclude) for node in nodes):
            return False
        factor = _factor(source.largest(), [reader.largest() for reader in site.readers])
        if np.abs(np.log(factor)).max(initial=0.0) <= _CHANGE:
            return False
        site.scale(graph, factor)
        return True


def _factor(before: Any, after: list[Any]) -> Any:
    behind = np.max(after, axis=0)
    # Of a product that is nearly zero the factor would be no number that float32 holds well.
    alive = (before > 1e-8) & (behind > 1e-8)
    ratio = np.where(alive, before, 1.0) / np.where(alive, behind, 1.0)
    return np.clip(np.sqrt(ratio), 1e-3, 1e3)
