"""Recipes on pieces of models: the speed-up that CPU engines' cost models say, by that measured.

The pieces are those of `trivium.compiler.microbenchmarks` that have weights worth quantizing, and
two products of a transformer. The habits of engines for small types (`Habits.reach`, ``unpack_s``,
``stall``) were set looking at this table, so it shows how well they fit; how well they foretell is
shown by `recipe_speeds`, on models.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.harness import Row
from benchmarks.pieces import Pieces

TITLE = "Recipes on pieces of models, on this CPU"

ENGINES = ("onnxruntime", "openvino", "xla")
RECIPES = ("none", "int8", "int8-dynamic", "int4", "bf16", "fp16")
NAMES = (
    "convolutions 16x32", "residual 24x20", "residual 32x16", "residual 128x7", "mobile 16x64x48",
    "perceptron of 16 rows", "encoder 64x256", "encoder 96x312", "encoder 128x512",
    "linear 128x384x384", "linear 128x384x1536",
)  # fmt: skip


def rows() -> Iterator[Row]:
    pieces = Pieces("recipe_pieces")
    for engine in ENGINES:
        found = pieces.of(engine, partial(_measured, engine))
        for recipe in RECIPES[1:] if found else ():
            # A machine that is slow today is so for float32 as well.
            ratios = [times[recipe] / times["none"] for times in found.values() if recipe in times]
            if not ratios:
                continue
            off = median(max(one, 1 / one) for one in ratios) - 1
            yield Row(
                f"{engine}, {recipe}: predicted / measured speed-up, {len(ratios)} pieces",
                f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
                "", f"median error {off:.0%}",
            )  # fmt: skip


def _measured(engine: str) -> dict[str, dict[str, float]]:
    """Piece -> recipe -> measured by predicted."""
    import onnx

    from trivium.compiler import compare
    from trivium.compiler import rows as shown
    from trivium.compiler.microbenchmarks import MICROBENCHMARKS, Builder

    more = {
        "linear 128x384x384": lambda: Builder((128, 384)).linear(384, 384).linear(384, 384),
        "linear 128x384x1536": lambda: Builder((128, 384)).linear(384, 1536).linear(1536, 384),
    }
    made: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in NAMES:
            proto = (MICROBENCHMARKS.get(name) or more[name])().model()
            path = Path(folder) / "piece.onnx"
            onnx.save(proto, path)
            shape = [dim.dim_value for dim in proto.graph.input[0].type.tensor_type.shape.dim]
            random = np.random.default_rng(0)
            feeds: Any = [{"x": random.normal(size=shape).astype(np.float32)} for _ in range(4)]
            found = compare.compare(
                path, ["cpu"], recipes=RECIPES, backends=[engine], measure=True, calibration=feeds
            )
            times = {one.recipe: shown.row(one) for one in found.candidates}
            made[name] = {
                recipe: row["measured"]["latency_s"] / row["latency_s"]
                for recipe, row in times.items()
                if row["measured"] and row["latency_s"]
            }
    return made
