"""``calibrate`` and ``track``."""

from __future__ import annotations

import argparse
from pathlib import Path

from trivium.compiler import calibrate as calibration
from trivium.compiler import targets as target_names
from trivium.compiler import track as tracking
from trivium.compiler.calibration import Calibration
from trivium.compiler.commands import console


def calibrate(arguments: argparse.Namespace) -> int:
    """Fit a target's cost models to this hardware or to published points, and write the file."""
    target = target_names.find(arguments.target)
    left_out: tuple[str, ...] = ()
    if arguments.points:
        published = calibration.from_csv(target, Path(arguments.points))
        tables = {"product": published.calibration}
        left_out = published.left_out
    else:
        with console.progress() as progress:
            tables = calibration.measure(target, arguments.budget, progress)
    path = Path(arguments.out) if arguments.out else calibration.default_file(target)
    calibration.write(path, tables)
    for line in left_out:
        console.warn(line)
    if arguments.json:
        document = {
            "target": target.name,
            "file": str(path),
            "tables": {name: one.to_toml() for name, one in tables.items()},
            "left_out": list(left_out),
        }
        console.print_json(document)
        return 0
    rows = [(name, str(one.points), _error(one), one.basis) for name, one in tables.items()]
    console.print_table(("table", "points", "80% within", "basis"), rows)
    print(f"written to {path}")
    return 0


def _error(one: Calibration) -> str:
    from trivium.compiler.calibration import interval

    return f"{interval(1.0, one.spread)[1] - 1.0:+.0%}"


def track(arguments: argparse.Namespace) -> int:
    """Show how right the predictions in a file of bench runs have been."""
    record = tracking.read(Path(arguments.file))
    found = tracking.summarize(record)
    if arguments.json:
        console.print_json({"file": arguments.file, "runs": len(record), **found})
        return 0
    columns = ("group", "runs", "MAPE", "median", "P90", "tau", "coverage")
    console.print_table(columns, [tracking.cells(name, one) for name, one in found.items()])
    return 0
