"""``compare`` and ``plan``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trivium.compiler import compare as comparing
from trivium.compiler import files, prices, quality, report
from trivium.compiler import plan as planning
from trivium.compiler.commands import console
from trivium.compiler.errors import BadInput
from trivium.compiler.prepare import Progress


def compare(arguments: argparse.Namespace) -> int:
    """Predict a model on many targets, and report."""
    _require_folders(arguments.html, arguments.csv)
    with console.progress() as progress:
        result = comparing.compare(
            arguments.model,
            arguments.target or None,
            recipes=tuple(arguments.recipe) or ("none",),
            backends="all" if arguments.backend == ["all"] else arguments.backend or None,
            measured=arguments.measured,
            **_shared(arguments, progress),
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
    _require_folders(arguments.html)
    constraints = planning.Constraints(
        max_latency_s=_parsed(planning.parse_seconds, arguments.max_latency, "--max-latency"),
        min_throughput_per_s=arguments.min_throughput,
        max_memory_bytes=_parsed(planning.parse_bytes, arguments.max_memory, "--max-memory"),
        max_usd_per_million=arguments.max_cost,
        max_watts=arguments.max_power,
        max_drop=_parsed(planning.parse_drop, arguments.max_drop, "--max-drop"),
        max_first_token_s=_parsed(
            planning.parse_seconds, arguments.max_first_token, "--max-first-token"
        ),
    )
    if constraints.max_first_token_s is not None and arguments.context is None:
        raise BadInput("only a generator has one", about="--max-first-token", remedy="--context N")
    quality.require_data(constraints.max_drop, arguments.data)
    with console.progress() as progress:
        result = planning.plan(
            arguments.model,
            constraints,
            arguments.objective,
            targets=arguments.target or None,
            recipes=tuple(arguments.recipe) or ("none",),
            backends="all" if arguments.backend == ["all"] else arguments.backend or "all",
            **_shared(arguments, progress),
        )
    if arguments.html:
        files.write_text(Path(arguments.html), report.to_html(result))
    if arguments.json:
        console.print_json(planning.to_json(result))
    else:
        report.terminal(result)
    planning.require_best(result)
    return 0


def _require_folders(*named: str | None) -> None:
    for file in filter(None, named):
        if not Path(file).parent.is_dir():
            raise BadInput("no such folder", about=str(Path(file).parent))


def _shared(arguments: argparse.Namespace, progress: Progress) -> Mapping[str, Any]:
    """The arguments that both verbs hand on."""
    judged = None
    if arguments.data:
        judged = quality.judge(
            arguments.model,
            arguments.data,
            metric=arguments.metric,
            calibration=arguments.calib,
            progress=progress,
        )
    return {
        "shape": arguments.shape,
        "batches": tuple(dict.fromkeys(arguments.batch)),
        "context": arguments.context,
        "new_tokens": arguments.new_tokens,
        "max_chips": arguments.max_chips,
        "prices": prices.read(Path(arguments.prices)) if arguments.prices else None,
        "quality": judged,
        "measure": arguments.measure,
        "calibration": arguments.calib,
        "progress": progress,
    }


def _parsed(parse: Callable[..., float], text: str | None, flag: str) -> float | None:
    return None if text is None else parse(text, flag=flag)
