"""SmoothQuant: share the outliers of activations with the weights that they meet."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx_ir as ir

from trivium.compiler.errors import BadInput
from trivium.compiler.passing import Pass, decline, from_context, option, sketching
from trivium.compiler.types import Preserves
from trivium.passes.quantization import layers, scaling, sharing
from trivium.passes.quantization.calibration import calibrate
from trivium.passes.quantization.observers import ChannelRanges

if TYPE_CHECKING:
    from trivium.compiler.backend import Tensors

_CHANGE = 0.01
"""Factors nearer to one than this change nothing, so that a smooth model is left as it is."""

_WORTH = {False: 0.95, True: 0.7}
"""Most of the expected error that may be left for a factor to be worth it: one that goes into other
weights, and one that costs a multiplication when the model runs."""


@dataclass(frozen=True)
class SmoothQuant(Pass):
    """Divide activations by a factor for each channel, and multiply the weights that read them.

    Xiao et al., 2022: ``s = max|x| ** share / max|w| ** (1 - share)``. What the model computes
    stays the same; a grid of 8 bits then covers activations and weights alike. Put it before
    quantize-static.

    ``1 / s`` goes into the normalization or the product that makes the activation; where something
    else reads it as well (the residual of a norm that comes last in its block), or where a function
    lies between (GELU), ``insert`` lets a multiplication take it, if that saves a good part of the
    error. With ``search`` each product of matrices gets the share with the least expected error.

    Left alone: activations that convolutions make or read and that cannot be divided for nothing,
    and channels that are zero on the calibration data.
    """

    name: ClassVar[str] = "smooth-quant"
    preserves: ClassVar[Preserves] = "numeric"

    share: float = option(0.5, "Of the outliers that the weights take, from 0 to 1")
    search: bool = option(False, "Whether to look for the best share of each product of matrices")
    insert: bool = option(False, "Whether a multiplication may be put before the products")
    convolutions: bool = option(True, "Whether what convolutions read is smoothed too")
    exclude: tuple[str, ...] = option((), layers.EXCLUDE)

    calibration: Iterable[Tensors] | None = from_context("calibration")

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share is {self.share}: give 0 to 1")

    def run(self, model: ir.Model) -> bool:
        layers.note_unmatched(model, self.exclude)
        kinds = scaling.PRODUCTS if self.convolutions else ("Gemm", "MatMul")
        found = scaling.sites(model.graph, insert=self.insert, products=kinds)
        sites = {site.value: site for site in found if self._wanted(site)}
        if not sites:
            return False
        if sketching():
            # The numbers change; the graph only where a multiplication is put.
            return self._sketched(model.graph, sites.values())
        if self.calibration is None:
            raise BadInput(
                "smoothing needs representative inputs",
                about=self.name,
                remedy="give them with --calib",
            )

        def make(value: ir.Value) -> ChannelRanges:
            return ChannelRanges(1 if sites[value].convolved else -1)

        seen = calibrate(model, list(sites), self.calibration, make)
        modified = False
        for value, observer in seen.observers.items():
            if value in seen.spoiled or not observer.seen:
                decline(value, "NaN or never reached on the calibration data")
                continue
            assert isinstance(observer, ChannelRanges)
            factor = self._factor(sites[value], observer)
            if factor is not None and np.abs(np.log(factor)).max(initial=0.0) > _CHANGE:
                sites[value].scale(model.graph, factor)
                modified = True
        return modified

    def _sketched(self, graph: ir.Graph, sites: Iterable[scaling.Site]) -> bool:
        inserted = [site for site in sites if not site.sources]
        for site in inserted:
            site.insert(graph, np.ones(site.channels, np.float32))
        return bool(inserted)

    def _wanted(self, site: scaling.Site) -> bool:
        if site.convolved and not self.convolutions:
            return False
        return not any(layers.excluded(reader.node, self.exclude) for reader in site.readers)

    def _factor(self, site: scaling.Site, seen: ChannelRanges) -> Any:
        """The factor of each channel, or None where it is not worth it."""
        inputs = seen.inputs
        inserted = not site.sources
        if site.convolved or not (self.search or inserted):
            weights = np.max([reader.largest() for reader in site.readers], axis=0)
            return sharing.factor(inputs.largest, weights, self.share)
        expected = sharing.Expected(inputs, [reader.matrix() for reader in site.readers])
        factor = expected.factor(expected.best() if self.search else self.share)
        left = expected.error(factor) / (expected.error(1.0) or 1.0)
        return factor if left < _WORTH[inserted] else None
