"""SmoothQuant: share the outliers of activations with the weights that they meet."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx_ir as ir

from trivium.compiler.errors import BadInput
from trivium.compiler.passing import Pass, decline, from_context, option
from trivium.compiler.types import Preserves
from trivium.passes.quantization import layers, scaling
from trivium.passes.quantization.calibration import calibrate
from trivium.passes.quantization.observers import ChannelMagnitudes

if TYPE_CHECKING:
    from trivium.compiler.backend import Tensors

_CHANGE = 0.01
"""Factors nearer to one than this change nothing, so that a smooth model is left as it is."""


@dataclass(frozen=True)
class SmoothQuant(Pass):
    """Divide activations by a factor for each channel, and multiply the weights that read them.

    Xiao et al., 2022: ``s = max|x| ** share / max|w| ** (1 - share)``. What the model computes
    stays the same; a grid of 8 bits then covers activations and weights alike. Put it before
    quantize-static.

    Left alone: activations that no normalization or product makes (1 / s has nowhere to go), those
    that something besides products reads, and channels that are zero on the calibration data.
    """

    name: ClassVar[str] = "smooth-quant"
    preserves: ClassVar[Preserves] = "numeric"

    share: float = option(0.5, "Of the outliers that the weights take, from 0 to 1")
    exclude: tuple[str, ...] = option((), layers.EXCLUDE)

    calibration: Iterable[Tensors] | None = from_context("calibration")

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share is {self.share}: give 0 to 1")

    def run(self, model: ir.Model) -> bool:
        layers.note_unmatched(model, self.exclude)
        sites = {site.value: site for site in scaling.sites(model.graph) if self._wanted(site)}
        if not sites:
            return False
        if self.calibration is None:
            raise BadInput(
                "smoothing needs representative inputs",
                about=self.name,
                remedy="give them with --calib",
            )

        def make(value: ir.Value) -> ChannelMagnitudes:
            return ChannelMagnitudes(1 if sites[value].convolved else -1)

        seen = calibrate(model, list(sites), self.calibration, make)
        modified = False
        for value, observer in seen.observers.items():
            if value in seen.spoiled or not observer.seen:
                decline(value, "NaN or never reached on the calibration data")
                continue
            assert isinstance(observer, ChannelMagnitudes)
            factor = self._factor(sites[value], observer.largest)
            if np.abs(np.log(factor)).max(initial=0.0) > _CHANGE:
                sites[value].scale(model.graph, factor)
                modified = True
        return modified

    def _wanted(self, site: scaling.Site) -> bool:
        return not any(layers.excluded(reader.node, self.exclude) for reader in site.readers)

    def _factor(self, site: scaling.Site, inputs: Any) -> Any:
        weights = np.max([reader.largest() for reader in site.readers], axis=0)
        alive = (inputs > 0) & (weights > 0)
        x, w = np.where(alive, inputs, 1.0), np.where(alive, weights, 1.0)
        return np.where(alive, x**self.share / w ** (1 - self.share), 1.0)
