"""Running commands and calls in turn, and what came of it: medians, spread, peak memory."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


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


def run_command(command: Sequence[str], samples: Samples, *, cpu: bool = False) -> None:
    """Run a command once; add its wall (or CPU) seconds and its peak resident memory.

    Raises:
        RuntimeError: It failed.
    """
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    started = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment
    )
    assert process.stderr is not None
    stderr = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: {stderr.decode(errors='replace')[-2000:]}")
    samples.seconds.append(usage.ru_utime + usage.ru_stime if cpu else wall)
    samples.peak_bytes.append(usage.ru_maxrss * 1024)


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
