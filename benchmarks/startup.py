"""``trivium --help`` against ``import numpy``, and a recompile that finds its artifact."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from benchmarks.harness import Row, Samples, in_turn, python, ratio, run_command, seconds
from benchmarks.workloads import shared

TITLE = "Starting up"

CLI = [sys.executable, "-m", "trivium.compiler.cli"]


def rows() -> list[Row]:
    found = [_help()]
    model = shared("models/cifar_resnet32.onnx")
    if model is not None:
        found.append(_recompile(model))
    return found


def _help() -> Row:
    ours, peer = in_turn(
        lambda s: run_command([*CLI, "--help"], s),
        lambda s: run_command(python("import numpy"), s),
        runs=15,
    )
    middle, text = ratio(ours.seconds, peer.seconds)
    return Row(
        "`trivium --help`", seconds(ours), f"`import numpy` {seconds(peer)}", text,
        "at most 3, and under 0.5 s", middle <= 3 and ours.median < 0.5,
    )  # fmt: skip


def _recompile(model: Path) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        command = [*CLI, "compile", str(model), "--target", "cpu", "-o", f"{folder}/out"]
        fresh, cached = Samples(), Samples()
        run_command([*command, "--no-cache"], fresh)
        run_command(command, Samples())
        for _ in range(7):
            run_command(command, cached)
    return Row(
        f"cached recompile of {model.stem}", seconds(cached), f"first compile {seconds(fresh)}",
        "", "under 2 s", max(cached.seconds) < 2,
    )  # fmt: skip
