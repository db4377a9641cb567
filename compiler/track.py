"""A file of predicted against measured, one run a line, and what it says of the predictions.

``trivium bench ARTIFACT --track FILE`` adds lines; nothing leaves the machine.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from statistics import mean, median
from typing import Any

from trivium.compiler import files
from trivium.compiler.errors import BadInput


@dataclass(frozen=True)
class Run:
    """One bench of an artifact.

    Attributes:
        model, recipe, target, backend: What was run.
        interval_s: The 80% interval of the prediction.
        calibration: What the prediction rested on.
    """

    date: str
    model: str
    recipe: str
    target: str
    backend: str
    predicted_s: float
    interval_s: tuple[float, float]
    measured_s: float
    calibration: str = ""


def of_bench(manifest: Mapping[str, Any], measured_s: float) -> Run | None:
    """The line of a run; ``None`` for an artifact that was not predicted."""
    estimate = manifest.get("estimate") or {}
    predicted, bounds = estimate.get("seconds"), (estimate.get("lo"), estimate.get("hi"))
    if predicted is None:
        return None
    return Run(
        datetime.datetime.now(datetime.UTC).date().isoformat(),
        str(manifest["model"]["name"]),
        str(manifest["recipe"]["name"]),
        str(manifest["target"]),
        str(manifest["backend"]),
        float(predicted),
        (float(bounds[0] or 0.0), float(bounds[1] or math.inf)),
        measured_s,
        str(estimate.get("calibration", "")),
    )


def add(path: Path, run: Run) -> None:
    """Append a run to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.writing(path), path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(asdict(run)) + "\n")


def read(path: Path) -> list[Run]:
    """Read a file of runs.

    Raises:
        BadInput: A line is not one.
    """
    files.require_file(path, remedy="trivium bench ARTIFACT --track FILE writes one")
    runs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            low, high = fields.pop("interval_s")
            run = Run(**fields, interval_s=(float(low), float(high)))
            if not (run.predicted_s > 0.0 and run.measured_s > 0.0):
                raise ValueError("times above 0")
        except (ValueError, TypeError, KeyError) as error:
            raise BadInput(f"line {number} is no run: {error}", about=str(path)) from error
        runs.append(run)
    if not runs:
        raise BadInput("holds no runs", about=str(path))
    return runs


def summarize(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """Figures of merit of all runs, by target and backend, and how well engines were chosen."""
    groups: dict[str, list[Run]] = {"all": list(runs)}
    for run in runs:
        groups.setdefault(f"{run.target}/{run.backend}", []).append(run)
    found = {name: _merit(group) for name, group in groups.items()}
    found["all"] |= _choice(runs)
    return found


def _merit(runs: Sequence[Run]) -> dict[str, Any]:
    errors = sorted(abs(run.predicted_s / run.measured_s - 1.0) for run in runs)
    inside = [run.interval_s[0] <= run.measured_s <= run.interval_s[1] for run in runs]
    return {
        "count": len(runs),
        "mape": mean(errors),
        "median": median(errors),
        "p90": errors[min(math.ceil(0.9 * len(errors)), len(errors)) - 1],
        "tau": kendall([(run.predicted_s, run.measured_s) for run in runs]),
        "coverage": sum(inside) / len(inside),
    }


def kendall(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Kendall's tau-a; ``None`` for fewer than two pairs."""
    signs = [
        math.copysign(1.0, (a[0] - b[0]) * (a[1] - b[1])) if a[0] != b[0] and a[1] != b[1] else 0.0
        for a, b in combinations(pairs, 2)
    ]
    return mean(signs) if signs else None


def _choice(runs: Sequence[Run]) -> dict[str, Any]:
    """Of models that several backends ran: how often the best was predicted, and the regret."""
    models: dict[tuple[str, str], dict[tuple[str, str], Run]] = {}
    for run in runs:
        models.setdefault((run.model, run.recipe), {})[run.target, run.backend] = run
    several = [list(one.values()) for one in models.values() if len(one) > 1]
    regrets = [
        min(one, key=lambda r: r.predicted_s).measured_s / min(r.measured_s for r in one) - 1.0
        for one in several
    ]
    if not regrets:
        return {"choices": 0, "top1": None, "regret": None}
    right = sum(regret == 0.0 for regret in regrets)
    return {"choices": len(regrets), "top1": right / len(regrets), "regret": mean(regrets)}


def cells(name: str, found: Mapping[str, Any]) -> tuple[str, ...]:
    """A row of the table that `trivium track` prints."""
    tau = "-" if found["tau"] is None else f"{found['tau']:.2f}"
    shares = (f"{found[key]:.1%}" for key in ("mape", "median", "p90"))
    return (name, str(found["count"]), *shares, tau, f"{found['coverage']:.0%}")
