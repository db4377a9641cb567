"""Running commands and calls in turn, and what came of it: medians, spread, peak memory."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One line of a results table.

    Attributes:
        what: What was measured.
        ours, peer: The two figures, in words with units; the peer's name is part of it.
        ratio: Ours by the peer's, as median (minimum to maximum of the pairs).
        bar: What the ratio or figure is to reach.
        met: Whether it does; None where there is no bar.
    """

    what: str
    ours: str
    peer: str
    ratio: str
    bar: str = ""
    met: bool | None = None


@dataclass
class Samples:
    """Figures of repeated runs."""

    seconds: list[float] = field(default_factory=list)
    peak_bytes: list[int] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def peak(self) -> float:
        return statistics.median(self.peak_bytes)


_LAUNCHER = """
import json, os, subprocess, sys, threading, time
command, limit, folder = json.loads(sys.argv[1])
started = time.perf_counter()
process = subprocess.Popen(
    command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=folder
)
killer = threading.Timer(limit, process.kill) if limit is not None else None
if killer is not None:
    killer.start()
stderr = process.stderr.read()
_, status, usage = os.wait4(process.pid, 0)
wall = time.perf_counter() - started
if killer is not None:
    killer.cancel()
process.returncode = os.waitstatus_to_exitcode(status)
print(json.dumps({
    "wall": wall, "cpu": usage.ru_utime + usage.ru_stime, "peak_kib": usage.ru_maxrss,
    "code": process.returncode, "stderr": stderr.decode(errors="replace")[-2000:],
}))
"""
"""A small process that starts the command: the kernel counts the memory of whoever starts one
towards its peak."""


def run_command(
    command: Sequence[str],
    samples: Samples,
    *,
    cpu: bool = False,
    limit: float | None = None,
    folder: Path | None = None,
) -> None:
    """Run a command once; add its wall (or CPU) seconds and its peak resident memory.

    Args:
        limit: Seconds after which it is killed.
        folder: Where it runs.

    Raises:
        RuntimeError: It failed, or took longer than the limit.
    """
    given = json.dumps([list(command), limit, str(folder) if folder is not None else None])
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    launched = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _LAUNCHER, given],
        capture_output=True, env=environment, check=False,
    )  # fmt: skip
    if launched.returncode:
        raise RuntimeError(launched.stderr.decode(errors="replace")[-2000:])
    found = json.loads(launched.stdout)
    if limit is not None and found["wall"] >= limit:
        raise RuntimeError(f"took over {limit:g} s")
    if found["code"]:
        raise RuntimeError(f"{' '.join(command)}: {found['stderr']}")
    samples.seconds.append(found["cpu"] if cpu else found["wall"])
    samples.peak_bytes.append(found["peak_kib"] * 1024)


def in_turn(
    ours: Callable[[Samples], None], peer: Callable[[Samples], None], runs: int = 5
) -> tuple[Samples, Samples]:
    """Run two things alternately, after one warm-up each, so that drift hits both."""
    ours(Samples())
    peer(Samples())
    a, b = Samples(), Samples()
    for _ in range(runs):
        ours(a)
        peer(b)
    return a, b


def ratio(a: Sequence[float], b: Sequence[float]) -> tuple[float, str]:
    """Median of the pairwise ratios, and how to write it."""
    pairs = [x / y for x, y in zip(a, b, strict=True)]
    middle = statistics.median(pairs)
    return middle, f"{middle:.2f} ({min(pairs):.2f} to {max(pairs):.2f})"


def seconds(samples: Samples) -> str:
    """``1.23 s (1.20 to 1.31)``, in the unit that fits."""
    factor, unit = (1.0, "s") if samples.median >= 1 else (1e3, "ms")
    low, high = min(samples.seconds) * factor, max(samples.seconds) * factor
    return f"{samples.median * factor:.3g} {unit} ({low:.3g} to {high:.3g})"


def mebibytes(count: float) -> str:
    return f"{count / (1 << 20):.0f} MiB"


def python(code: str, *arguments: str) -> list[str]:
    """The command line that runs a piece of Python with this interpreter."""
    return [sys.executable, "-c", code, *arguments]
