"""What XLA's own compilers say of a model on each TPU generation and GPU: writes docs/slices.md.

    python benchmarks/slices.py MODEL [--shape seq=128 ...] [--target NAME ...] [-o FILE]

Every row is a compile ahead of time on this machine, verified on its CPU; memory is the target
compiler's analysis of one device, not an estimate.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import trivium
from trivium.compiler.errors import TriviumError

TARGETS = (
    "tpu-v4:2x2x1",
    "tpu-v5e",
    "tpu-v5e:2x2",
    "tpu-v5e:4x4",
    "tpu-v5p:2x2x1",
    "tpu-v6e",
    "tpu-v6e:2x2",
    "tpu-7x:2x2x1",
    "nvidia-t4",
    "nvidia-l4",
    "nvidia-a100-80-sxm",
    "nvidia-h100-sxm",
    "nvidia-b200",
    "cpu",
)

COLUMNS = (
    "target", "devices", "spread", "compile s", "CPU s", "compiler peak MB", "weights MB",
    "arguments MB", "outputs MB", "temporaries MB", "code MB", "Gflop each", "collectives", "error",
)  # fmt: skip


def main() -> int:
    """Compile for every target, print each row as it comes, write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", help="an .onnx file or a checkpoint folder")
    parser.add_argument("--shape", action="append", default=[])
    parser.add_argument("--target", action="append", default=[])
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/slices.md"))
    given = parser.parse_args()
    rows = []
    for target in given.target or TARGETS:
        rows.append(row(given.model, target, given.shape))
        print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    given.output.write_text(page(given.model, given.shape, rows), encoding="utf-8")
    return 0


def row(model: str, target: str, shape: Sequence[str]) -> list[str]:
    """Compile for one target; the cells of its row, or the reason why there are none."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            artifact = trivium.compile(
                model, target, out=Path(folder) / "out", backend="xla", shape=shape, use_cache=False
            )
        except TriviumError as error:
            return [target, *[""] * (len(COLUMNS) - 2), str(error)]
    return cells(target, artifact.manifest)


def cells(target: str, manifest: Mapping[str, Any]) -> list[str]:
    """The cells of a compile that succeeded."""
    xla = manifest["details"]["xla"]
    (program,) = xla["programs"].values()
    memory = program["memory"]
    flops = program["compiler_flops"]
    collectives = program["collectives"]
    return [
        target,
        str(xla["devices"]),
        program["partition"]["kind"],
        f"{program['compile_seconds']:.1f}",
        f"{xla['cpu_seconds']:.1f}",
        f"{xla['peak_rss_bytes'] / 1e6:.0f}" if xla["peak_rss_bytes"] else "unknown",
        *(
            f"{size / 1e6:.2f}"
            for size in (
                program["weights_bytes"],
                memory["arguments"],
                memory["outputs"],
                memory["temporaries"],
                memory["code"],
            )
        ),
        f"{flops / 1e9:.2f}" if flops else "unknown",
        ", ".join(f"{name} x{one['count']}" for name, one in collectives.items()) or "none",
        f"{manifest['verification']['max_rel_error']:.1e}",
    ]


def page(model: str, shape: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The page as Markdown."""
    versions = ", ".join(f"{k} {v}" for k, v in _versions().items())
    lines = [
        "# XLA on TPU slices and GPUs, compiled without them",
        "",
        f"Written by `python benchmarks/slices.py {'/'.join(Path(model).parts[-2:])} "
        f"{' '.join(f'--shape {item}' for item in shape)}` with {versions} on "
        f"{os.cpu_count()} cores ({platform.machine()}). Each row is a real compile by the "
        "target's own compiler.",
        "",
        "*compile s* is the wall clock of the compiler alone, on a machine that had other work; "
        "*CPU s* is all that its process used, imports and tracing included. "
        "Memory is the compiler's analysis of one device (a jax device: one v4, v5e, v5p or v6e "
        "chip, half a 7x chip, one GPU). *Code* is the program itself in device memory; the GPU "
        "plug-in does not report it. Temporaries are 0 where all of them stay in on-chip memory. "
        "*Gflop each* is the compiler's count for one device. *error* is the largest relative "
        "error against the source model in the run on this machine's CPU: no accelerator ran.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{'---|' * len(COLUMNS)}",
        *(f"| {' | '.join(one)} |" for one in rows),
        "",
    ]
    return "\n".join(lines)


def _versions() -> dict[str, str]:
    from trivium.compiler import plugins

    backend = plugins.get("trivium.backends", "xla")
    versions: dict[str, str] = backend.toolchain()
    return versions


if __name__ == "__main__":
    sys.exit(main())
