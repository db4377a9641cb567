"""What the cost model says of recipes' speed-up on this CPU, beside what was measured."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import workloads
from benchmarks.harness import Row
from benchmarks.pieces import Pieces


def rows(folder: Path, pieces: Pieces) -> list[Row]:
    """A row for each recipe of the models that `compression` quantizes.

    Args:
        folder: Where it has written its feeds and MiniLM.
    """
    made = []
    for name, source, feeds, shape, recipes in (
        ("ResNet-8", workloads.shared("models/mlperf_ic_resnet8_fp32.onnx"),
         "mlperf_ic_resnet8_fp32-0.npz", "input_1=1x32x32x3", ("int8",)),
        ("ResNet-20", workloads.shared("models/cifar_resnet20.onnx"), "cifar_resnet20-0.npz", "N=1",
         ("int8",)),
        ("ResNet-32", workloads.shared("models/cifar_resnet32.onnx"), "cifar_resnet32-0.npz", "N=1",
         ("int8",)),
        ("MiniLM", folder / "minilm.onnx", "sentences_calibration.npz", "batch=1,seq=128",
         ("int8-smooth", "int8-dynamic", "int4")),
    ):  # fmt: skip
        if source is None or not source.is_file():
            continue
        figures = pieces.of(
            f"{name}/speed", partial(_speed, source, folder / feeds, shape.split(","), recipes)
        )
        for recipe, found in (figures or {}).items():
            if "refused" in found:
                print(f"{name}, {recipe}: not measured: {found['refused']}", file=sys.stderr)
                continue
            made.append(_speed_row(f"{name}, {recipe}: speed-up on this CPU", found))
    return made


def _speed(
    source: Path, feeds: Path, shape: Sequence[str], recipes: Sequence[str]
) -> dict[str, Any]:
    import numpy as np

    from trivium.compiler import compare
    from trivium.compiler import rows as shown

    with np.load(feeds) as archive:
        calibration = [{k: v[i : i + 1] for k, v in archive.items()} for i in range(8)]
    found = compare.compare(
        source, ["cpu"], recipes=["none", *recipes], shape=shape, measure=True,
        calibration=calibration,
    )  # fmt: skip
    by_recipe = {one.recipe: shown.row(one) for one in found.candidates}
    base = by_recipe["none"]
    made: dict[str, Any] = {}
    for recipe in recipes:
        row = by_recipe[recipe]
        if not all(one["measured"] and one["latency_s"] for one in (row, base)):
            made[recipe] = {"refused": str(row["refusals"] or base["refusals"])}
            continue
        made[recipe] = {
            "predicted": base["latency_s"] / row["latency_s"],
            "before_s": base["measured"]["latency_s"],
            "after_s": row["measured"]["latency_s"],
        }
    return made


def _speed_row(what: str, found: dict[str, float]) -> Row:
    from trivium.compiler.report import units

    before, after, predicted = found["before_s"], found["after_s"], found["predicted"]
    times = f"{units.seconds(before)} to {units.seconds(after)}"
    return Row(
        what, f"predicted {predicted:.2f}", f"measured {before / after:.2f} ({times})",
        f"{predicted * after / before:.2f}",
    )  # fmt: skip
