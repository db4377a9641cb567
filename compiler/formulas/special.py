"""Operators that are like no other: image geometry, selection, text features."""

from __future__ import annotations

import math

from trivium.compiler.work import TRANSCENDENTAL, Demand, Site, formula

TAPS = {"nearest": 1, "linear": 2, "bilinear": 2, "cubic": 4, "bicubic": 4}
"""Samples that an interpolation takes along each axis."""


def _interpolated(mode: str, axes: int) -> int:
    """Operations for one output element: a multiply-add for each tap; copying takes none."""
    taps = TAPS.get(mode, 2)
    return 0 if taps == 1 else 2 * taps**axes


@formula("Resize", "Upsample")
def resize(site: Site) -> Demand:
    scaled = sum(a != b for a, b in zip(site.shape(), site.out_shape(), strict=True))
    operations = site.out_count() * _interpolated(site.attr("mode", "nearest"), scaled)
    return Demand(vector=float(operations), reads=dict.fromkeys(range(1, 4), 0.0))


@formula("GridSample")
def grid_sample(site: Site) -> Demand:
    axes = len(site.shape()) - 2
    mode = site.attr("mode", "linear")
    return Demand(vector=float(site.out_count() * (_interpolated(mode, axes) + 2 * axes)))


@formula("AffineGrid")
def affine_grid(site: Site) -> Demand:
    """A small matrix times each grid point."""
    axes = site.out_shape()[-1]
    return Demand(vector=float(site.out_count() * 2 * (axes + 1)))


@formula("RoiAlign")
def roi_align(site: Site) -> Demand:
    """Bilinear samples (8 operations) in each bin, averaged."""
    samples = max(site.attr("sampling_ratio", 0), 1) ** 2
    return Demand(vector=float(site.out_count() * samples * 9))


@formula("MaxRoiPool")
def max_roi_pool(site: Site) -> Demand:
    """At most every input element once for each region."""
    regions = site.shape(1)[0]
    batch = max(site.shape()[0], 1)
    return Demand(vector=float(site.count() / batch * regions))


@formula("MaxUnpool", "Col2Im")
def unfold(site: Site) -> Demand:
    """Each input element is added to one place."""
    return Demand(vector=float(site.count()))


@formula("NonMaxSuppression")
def non_max_suppression(site: Site) -> Demand:
    """Sorting by score, then every pair of boxes at worst (some 12 operations for an overlap)."""
    batch, boxes, _ = site.shape()
    classes = site.shape(1)[1]
    limit = site.constant(2)
    kept = min(int(limit.reshape(-1)[0]), boxes) if limit is not None else boxes
    sort = boxes * math.log2(max(boxes, 2))
    return Demand(
        vector=float(batch * classes * (sort + 12 * boxes * max(kept, 1))), writes={0: 0.0}
    )


@formula("NonZero")
def non_zero(site: Site) -> Demand:
    """One test for each element; at most all of them are listed."""
    rank = max(len(site.shape()), 1)
    return Demand(vector=float(site.count()), writes={0: 8.0 * rank * site.count()})


@formula("Unique")
def unique(site: Site) -> Demand:
    """A sort; the outputs are at most as long as the input."""
    size = site.count()
    dtype = site.bytes()
    writes = {0: dtype} | dict.fromkeys(range(1, 4), 8.0 * size)
    return Demand(vector=size * math.log2(max(size, 2)), writes=writes)


@formula("Multinomial")
def multinomial(site: Site) -> Demand:
    """A cumulative softmax, then a search for each sample."""
    classes = site.shape()[-1]
    draws = site.out_count() * (TRANSCENDENTAL + math.log2(max(classes, 2)))
    return Demand(vector=site.count() * (TRANSCENDENTAL + 4.0) + draws)


@formula("MelWeightMatrix")
def mel_weight_matrix(site: Site) -> Demand:
    return Demand(vector=float(site.out_count() * 4))


@formula("TfIdfVectorizer")
def tf_idf_vectorizer(site: Site) -> Demand:
    """One look-up for each position and length of n-gram."""
    lengths = site.attr("max_gram_length", 1) * (site.attr("max_skip_count", 0) + 1)
    return Demand(vector=float(site.count() * lengths))
