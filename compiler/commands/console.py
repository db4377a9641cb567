"""What the verbs share: JSON on standard output, progress and warnings on standard error, and
numbers as people read them."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trivium.compiler.prepare import Progress

_QUIET_S = 1.0
"""Work shorter than this shows no progress."""

_LINE_S = 10.0
"""Seconds between two lines of a training's log."""


def print_json(document: Any) -> None:
    """Print one JSON document; NaN and infinity have no place in it."""
    # Whole before any of it is written: half a document is worse than none.
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def warn(text: str) -> None:
    """Print one line of warning."""
    print(f"warning: {text}", file=sys.stderr)


@contextmanager
def progress() -> Iterator[Progress]:
    """Yield a callback that shows the stage at work, with its time, once work exceeds a second.

    On a terminal a live line; otherwise (a log) one line for each stage that took long.
    """
    if not sys.stderr.isatty():
        yield _StageLog()
        return
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    started = time.monotonic()
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("", total=None, visible=False)

        def show(stage: str) -> None:
            bars.update(task, description=stage, visible=time.monotonic() - started > _QUIET_S)

        yield show


@contextmanager
def bar() -> Iterator[Callable[[int, int, Mapping[str, float]], None]]:
    """Yield a callback that shows how far a training is, with its figures.

    On a terminal a bar; otherwise a line now and then.
    """
    if not sys.stderr.isatty():
        yield _StepLog()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Left

    columns = (BarColumn(), MofNCompleteColumn(), Left(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("preparing", total=None)

        def show(step: int, steps: int, figures: Mapping[str, float]) -> None:
            bars.update(task, completed=step, total=steps, description=_figures(figures))

        yield show


class _StepLog:
    def __init__(self) -> None:
        self._said = 0.0

    def __call__(self, step: int, steps: int, figures: Mapping[str, float]) -> None:
        now = time.monotonic()
        if now - self._said > _LINE_S or step == steps:
            print(f"update {step}/{steps}: {_figures(figures)}", file=sys.stderr, flush=True)
            self._said = now


def _figures(figures: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in figures.items())


@contextmanager
def counting(what: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a callback for ``(done, total)``: a bar on a terminal, else a line if it took long."""
    if not sys.stderr.isatty():
        started, seen = time.monotonic(), [0, 0]

        def note(done: int, total: int) -> None:
            seen[:] = done, total

        yield note
        took = time.monotonic() - started
        if took > _QUIET_S:
            print(f"{what}: {seen[0]} of {seen[1]}, {took:.1f} s", file=sys.stderr)
        return
    from rich.console import Console
    from rich.progress import Progress as Bars

    with Bars(console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(what, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


class _StageLog:
    def __init__(self) -> None:
        self._stage, self._since = "", time.monotonic()

    def __call__(self, stage: str) -> None:
        # "layers: 3 of 60" is a stage called "layers"; on a terminal its count shows too.
        stage = stage.partition(": ")[0]
        if stage == self._stage:
            return
        now = time.monotonic()
        if self._stage and now - self._since > _QUIET_S:
            print(f"{self._stage}: {now - self._since:.1f} s", file=sys.stderr)
        self._stage, self._since = stage, now


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table as wide as the terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    width = None if sys.stdout.isatty() else 160
    Console(width=width, highlight=False, markup=False).print(table)


def print_facts(facts: Mapping[str, Any]) -> None:
    """Print ``name  value`` lines, leaving out what is unknown."""
    width = max((len(name) for name in facts), default=0)
    for name, value in facts.items():
        if value not in (None, "", [], {}):
            print(f"{name:<{width}}  {value}")


def si(number: float | None, unit: str) -> str:
    """``0.00123, "s"`` -> ``1.23 ms``; unknown is a dash."""
    if number is None:
        return "-"
    if number == 0:
        return f"0 {unit}"
    prefixes = (
        (1e15, "P"),
        (1e12, "T"),
        (1e9, "G"),
        (1e6, "M"),
        (1e3, "k"),
        (1, ""),
        (1e-3, "m"),
        (1e-6, "u"),
    )
    for factor, prefix in prefixes:
        if abs(number) >= factor:
            return f"{number / factor:.3g} {prefix}{unit}"
    return f"{number * 1e9:.3g} n{unit}"


def size(count: float | None) -> str:
    """Bytes in binary units."""
    if count is None:
        return "-"
    for factor, unit in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f} B"
