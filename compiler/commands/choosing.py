"""``compare`` and ``plan``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from trivium.compiler import compare as comparing
from trivium.compiler import files, report
from trivium.compiler import plan as planning
from trivium.compiler.commands import console
from trivium.compiler.errors import BadInput


def compare(arguments: argparse.Namespace) -> int:
    """Predict a model on many targets, and report."""
    for file in [Path(file) for file in (arguments.html, arguments.csv) if file]:
        if not file.parent.is_dir():
            raise BadInput("no such folder", about=str(file.parent))
    with console.progress() as progress:
        result = comparing.compare(
            arguments.model,
            arguments.target or None,
            recipes=tuple(arguments.recipe) or ("none",),
            shape=arguments.shape,
            backends=arguments.backend or None,
            measure=arguments.measure,
            measured=arguments.measured,
            calibration=arguments.calib,
            progress=progress,
        )
    if arguments.html:
        files.write_text(Path(arguments.html), report.to_html(result))
    if arguments.csv:
        files.write_text(Path(arguments.csv), report.to_csv(result))
    if arguments.json:
        console.print_json(result.to_json())
    else:
        report.terminal(result)
    return 0


def plan(arguments: argparse.Namespace) -> int:
    """Pick the target that meets the constraints; exit 1 if none does."""
    constraints = planning.Constraints(
        max_latency_s=_parsed(planning.parse_seconds, arguments.max_latency, "--max-latency"),
        min_throughput_per_s=arguments.min_throughput,
        max_memory_bytes=_parsed(planning.parse_bytes, arguments.max_memory, "--max-memory"),
        max_usd_per_million=arguments.max_cost,
        max_watts=arguments.max_power,
    )
    with console.progress() as progress:
        result = planning.plan(
            arguments.model,
            constraints,
            arguments.objective,
            targets=arguments.target or None,
            recipes=tuple(arguments.recipe) or ("none",),
            shape=arguments.shape,
            progress=progress,
        )
    if arguments.json:
        console.print_json(planning.to_json(result))
    else:
        report.terminal(result)
    planning.require_best(result)
    return 0


def _parsed(parse: Callable[..., float], text: str | None, flag: str) -> float | None:
    return None if text is None else parse(text, flag=flag)
