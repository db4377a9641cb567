"""What running identical layers as one scan does to a compile: writes docs/scan.md.

    python benchmarks/scan.py [--target tpu-v5e ...] [--layers 12 32] [-o FILE]

Llama 2 7B's layers in bfloat16, weights by shape only, a call of 8 sequences of 128 tokens,
compiled unrolled and as a scan in turn, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from sharding import LLAMA_2_7B, model  # type: ignore[import-not-found]

from trivium.backends.xla import compiling, exporting, partition, platforms
from trivium.backends.xla.lowering import lower
from trivium.compiler import shapes, targets
from trivium.compiler.types import Workload

COLUMNS = (
    "target", "layers", "way", "trace s", "compile s", "CPU s", "arguments MB", "temporaries MB",
    "code MB",
)  # fmt: skip


def measure(name: str, layers: int, roll: bool) -> dict[str, Any]:
    """Compile one way; must run in the environment of `platforms.environment`."""
    device = platforms.device_of(targets.find(name))
    made = model(layers, LLAMA_2_7B)
    shapes.bind(made, Workload(dims={"batch": 8, "seq": 128}))
    devices = compiling.compile_devices(device)
    busy, started = time.process_time(), time.perf_counter()
    lowered = lower(made, roll=roll)
    assert bool(lowered.stacks) == roll
    exported = exporting.export(lowered, device, "default")
    traced = time.perf_counter()
    compiled = compiling.compile_export(exported, lowered, partition.SINGLE, devices[:1])
    return {
        "trace": traced - started,
        "compile": time.perf_counter() - traced,
        "cpu": time.process_time() - busy,
        "memory": compiling.memory_of(compiled),
    }


def main() -> int:
    """Compile every row, print it as it comes, write the page; or be the process of one row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--target", nargs="+", default=["tpu-v5e", "nvidia-h100-sxm", "cpu"])
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 32])
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/scan.md"))
    given = parser.parse_args()
    if given.only:
        layers, way = given.only
        print(json.dumps(measure(given.target[0], int(layers), way == "scan")))
        return 0
    rows = []
    for target, layers, way in product(given.target, given.layers, ("unrolled", "scan")):
        found = _in_a_process(target, layers, way)
        memory = (found["memory"][part] for part in ("arguments", "temporaries", "code"))
        seconds = (found["trace"], found["compile"], found["cpu"])
        rows.append([target, str(layers), way, *(f"{s:.1f}" for s in seconds),
                     *(f"{size / 1e6:,.1f}" for size in memory)])  # fmt: skip
        print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    given.output.write_text(page(rows), encoding="utf-8")
    return 0


def _in_a_process(target: str, layers: int, way: str) -> dict[str, Any]:
    device = platforms.device_of(targets.find(target))
    command = [sys.executable, __file__, "--target", target, "--only", str(layers), way]
    environment = {**os.environ, **platforms.environment(device)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def page(rows: Sequence[Sequence[str]]) -> str:
    """The page as Markdown."""
    versions = ", ".join(f"{k} {v}" for k, v in platforms.versions().items())
    return "\n".join(
        [
            "# Identical layers as one scan",
            "",
            f"Written by `python benchmarks/scan.py` with {versions}. Llama 2 7B's layers, "
            "bfloat16, 8 sequences of 128 tokens, compiled ahead of time; weights by shape only. "
            "*trace* and *compile* are by the wall clock on a machine that had other work, *CPU s* "
            "what the process used for both. As a scan the blocks are one fewer than "
            "the layers, since the first makes what all share. Weights are stacked when they are "
            "loaded: *arguments* are the same bytes either way.",
            "",
            f"| {' | '.join(COLUMNS)} |",
            f"|{'---|' * len(COLUMNS)}",
            *(f"| {' | '.join(row)} |" for row in rows),
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
