"""AWQ (Lin et al., 2023): enlarge the weights of the channels whose inputs are large.

A weight times s, and its input divided by s, has the same product, but its rounding error counts
1 / s. The factors are ``s = rms(x) ** share``, with the share that has the least squared error of
the outputs of all products that read the activation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from trivium.passes.quantization import blocks, scaling
from trivium.passes.quantization.blocks import Form
from trivium.passes.quantization.moments import Moment
from trivium.passes.quantization.scaling import Site
from trivium.passes.quantization.storing import matrix

Array = np.ndarray[Any, np.dtype[Any]]

SHARES = tuple(np.linspace(0.0, 0.95, 20))


def sites(graph: ir.Graph, wanted: Mapping[ir.Node, Form]) -> dict[ir.Value, Site]:
    """The activations that can be scaled and that only products to be quantized read."""
    return {
        site.value: site
        for site in scaling.sites(graph)
        if all(reader.node in wanted for reader in site.readers)
    }


def factors(site: Site, moment: Moment, wanted: Mapping[ir.Node, Form]) -> Array:
    """The factor of each channel with the least error.

    Args:
        site: The activation and its readers.
        moment: Of the activation.
        wanted: How the weight of each reader will be stored.
    """
    whole = moment.matrix / max(moment.rows, 1)
    size = np.sqrt(np.maximum(np.diag(whole), 0))
    size = np.maximum(size, 1e-4 * size.max(initial=1e-12))
    weights = [(matrix(r.value, r.node), wanted[r.node]) for r in site.readers]
    best, chosen = np.inf, np.ones(len(size), np.float32)
    for share in SHARES:
        factor = size**share
        factor = (factor / np.sqrt(factor.max() * factor.min())).astype(np.float32)
        error = sum(_error(array, form, factor, whole) for array, form in weights)
        if error < best:
            best, chosen = error, factor
    return chosen


def _error(array: Array, form: Form, factor: Array, moment: Array) -> float:
    scaled = array * factor[:, None]
    off = blocks.nearest(scaled, form).restored() / factor[:, None] - array
    return float(np.sum(off * (moment @ off), dtype=np.float64))
