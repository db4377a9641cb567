"""JSON, CSV and the table on a terminal."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from trivium.compiler import plan as planning
from trivium.compiler.compare import Comparison
from trivium.compiler.report import units
from trivium.compiler.rows import unpredicted
from trivium.compiler.types import Plan

if TYPE_CHECKING:
    from rich.console import Console

Result = Comparison | Plan

COLUMNS = (
    *("target", "backend", "recipe", "feasible", "latency_s", "interval_low_s", "interval_high_s"),
    *("measured_s", "measured_low_s", "measured_high_s", "throughput_per_s", "memory_bytes"),
    *(
        "energy_j",
        "energy_per_sample_j",
        "usd_per_million",
        "usd_per_hour",
        "batch",
        "pareto",
        "bound",
        "verdict",
        "refusals",
        "calibration",
        "notes",
    ),
    *("first_token_s", "step_s", "tokens_per_s", "cache_bytes", "cache_dtype", "largest_batch"),
    "context",
)
"""The columns of the CSV; the last are those of generators."""


def document(result: Result) -> dict[str, Any]:
    """The JSON of a comparison or a plan, its rows under ``rows`` either way."""
    if isinstance(result, Plan):
        table = planning.to_json(result)
        return {**table, "rows": table["candidates"]}
    return result.to_json()


def to_json(result: Result) -> str:
    """What ``--json`` prints."""
    table = planning.to_json(result) if isinstance(result, Plan) else result.to_json()
    return json.dumps(table, indent=2, allow_nan=False)


def to_csv(result: Result) -> str:
    """One line for each candidate; what is unknown is empty."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in document(result)["rows"]:
        low, high = row["interval_s"] or (None, None)
        measured = row["measured"] or {}
        first, last = measured.get("ci_s") or (None, None)
        flat = {
            **{key: (row["serving"] or row).get(key, row.get(key)) for key in COLUMNS},
            "interval_low_s": low,
            "interval_high_s": high,
            "measured_s": measured.get("latency_s"),
            "measured_low_s": first,
            "measured_high_s": last,
            "refusals": "; ".join(row["refusals"]),
            "notes": "; ".join(row["notes"]),
        }
        writer.writerow(flat)
    return stream.getvalue()


@dataclass(frozen=True)
class Column:
    """A column of the terminal's table.

    Attributes:
        least_width: Of the terminal; a narrower one leaves the column out.
        only_if: Whether any row has something to show.
    """

    heading: str
    show: Callable[[dict[str, Any]], str]
    justify: Literal["left", "right"] = "right"
    least_width: int = 0
    only_if: Callable[[dict[str, Any]], bool] = lambda row: True

    def wanted(self, rows: list[dict[str, Any]], width: int) -> bool:
        return width >= self.least_width and any(self.only_if(row) for row in rows)


def _latency_interval(row: dict[str, Any]) -> str:
    return units.interval(row["interval_s"], units.seconds(row["latency_s"]))


def _measured(row: dict[str, Any]) -> str:
    return units.seconds((row["measured"] or {}).get("latency_s"))


def _drop(row: dict[str, Any]) -> str:
    drop = (row["quality"] or {}).get("drop")
    return units.UNKNOWN if drop is None else f"{drop:.4g}"


def _price(row: dict[str, Any]) -> str:
    price = row["usd_per_million"]
    return units.UNKNOWN if price is None else units.digits(price)


PLANNED = 30
"""How many candidates of a plan a terminal shows; the rest is in JSON and on the page."""


REASONS, NAMED, LONG = 12, 4, 60
"""How many reasons of refusals a terminal tells, how many targets of each for a plan, and how much
of the name of a node."""


def _serving(row: dict[str, Any], name: str) -> Any:
    return (row["serving"] or {}).get(name)


def _generates(row: dict[str, Any]) -> bool:
    return row["serving"] is not None


def _calls(row: dict[str, Any]) -> bool:
    return row["serving"] is None


def _energy(row: dict[str, Any]) -> str:
    if _calls(row) or row["energy_per_sample_j"] is None:
        return units.scaled(row["energy_j"], "J")
    return units.scaled(row["energy_per_sample_j"] * 1e6, "J")


TERMINAL = (
    Column("target", lambda row: str(row["target"]), "left"),
    Column("backend", lambda row: str(row["backend"]), "left"),
    Column("batch", lambda row: str(row["batch"]), only_if=lambda row: row["batch"] != 1),
    Column("recipe", lambda row: str(row["recipe"]), "left", 0, lambda r: r["recipe"] != "none"),
    Column("latency", lambda row: units.seconds(row["latency_s"]), only_if=_calls),
    Column("80% interval", _latency_interval, least_width=100, only_if=_calls),
    Column(
        "first token", lambda r: units.seconds(_serving(r, "first_token_s")), only_if=_generates
    ),
    Column("a token", lambda r: units.seconds(_serving(r, "step_s")), only_if=_generates),
    Column("tokens/s", lambda r: units.scaled(r["throughput_per_s"], ""), only_if=_generates),
    Column(
        "caches",
        lambda r: f"{units.bytes_(_serving(r, 'cache_bytes'))}, {_serving(r, 'cache_dtype')}",
        least_width=110,
        only_if=_generates,
    ),
    Column(
        "batch that fits",
        lambda r: str(_serving(r, "largest_batch") or units.UNKNOWN),
        least_width=100,
        only_if=_generates,
    ),
    Column("measured", _measured, only_if=lambda row: row["measured"] is not None),
    Column("drop", _drop, only_if=lambda row: row["quality"] is not None),
    Column("calls/s", lambda row: units.scaled(row["throughput_per_s"], ""), "right", 120, _calls),
    Column("memory", lambda row: units.bytes_(row["memory_bytes"])),
    Column("energy", _energy, least_width=90, only_if=_calls),
    Column("J/million", _energy, least_width=90, only_if=_generates),
    Column("$/million", _price),
    Column("bound", lambda row: row["bound"] or units.UNKNOWN, "left", 110),
)


def terminal(result: Result, *, console: Console | None = None) -> None:
    """Print the candidates as a table, then why the refused ones are refused."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    out = console or Console()
    if console is None and not out.is_terminal:
        out = Console(width=200)  # a pipe has no width to keep to
    rows = document(result)["rows"]
    feasible = [row for row in rows if row["feasible"]]
    most = PLANNED if isinstance(result, Plan) else len(feasible)
    columns = [column for column in TERMINAL if column.wanted(feasible or rows, out.width)]
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column.heading, justify=column.justify, no_wrap=True)
    for row in feasible[:most]:
        cells = [column.show(row) for column in columns]
        table.add_row(*cells, style="bold" if row.get("verdict") == "best" else "")
    out.print(table)
    if len(feasible) > most:
        out.print(Text(f"and {len(feasible) - most} more that can run it: --json or --html"))
    refused = [row for row in rows if not row["feasible"]]
    if refused:
        out.print()
        for line in _refusals(refused, NAMED if isinstance(result, Plan) else len(refused)):
            out.print(Text(line, style="dim"))
    if not isinstance(result, Plan):
        for row in feasible:
            # A plan's verdict says it; here a row of dashes would stand without a reason.
            if row["latency_s"] is None and row["notes"]:
                why = unpredicted(row["notes"]) or row["notes"]
                out.print(Text(f"{row['target']} with {row['backend']}: {why[0]}", style="dim"))
    if isinstance(result, Plan):
        out.print()
        for row in feasible[:most]:
            where = f"{row['target']}/{row['backend']}/{row['recipe']}"
            where += f"/batch {row['batch']}" if row["batch"] != 1 else ""
            change = f"; would win if {row['wins_if']}" if row["wins_if"] else ""
            if row["verdict"] != "best":
                out.print(Text(f"{where}: {row['verdict']}{change}"))
        answer = document(result).get("answer")
        if answer:
            out.print()
            out.print(Text(answer, style="bold"))


def _short(reason: str) -> str:
    """A reason whose node does not fill the line: exported names run to hundreds of letters."""
    name, bracket, rest = reason.partition(" (")
    if not bracket or len(name) <= LONG:
        return reason
    return f"{name[: LONG // 2]}...{name[-LONG // 2 :]}{bracket}{rest}"


def _refusals(rows: list[dict[str, Any]], most: int) -> Iterator[str]:
    """What cannot run it and why: targets, and recipes, of one reason together."""
    groups: dict[tuple[str, str], dict[str, None]] = {}
    recipes: dict[tuple[str, str], dict[str, None]] = {}
    for row in rows:
        # The reason names the target here and there.
        reason = _short(str(row["refusals"][0]).replace(row["target"], "it"))
        others = len(row["refusals"]) - 1
        reason += f" (and {others} more)" if others else ""
        key = (row["backend"], reason)
        groups.setdefault(key, {})[row["target"]] = None
        recipes.setdefault(key, {})[row["recipe"]] = None
    for key, targets in list(groups.items())[:REASONS]:
        named = list(targets)
        more = f" and {len(named) - most} more" if len(named) > most else ""
        of = f" ({', '.join(recipes[key])})"
        yield f"{', '.join(named[:most])}{more} with {key[0]}{of}: {key[1]}"
    if len(groups) > REASONS:
        yield f"and for {len(groups) - REASONS} more reasons: --json or --html"
