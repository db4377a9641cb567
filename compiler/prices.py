"""Tables of prices: what an hour of a chip costs, when that was read, and where.

::

    [[price]]
    target = "nvidia-h100-sxm"      # a device, or one slice of it: tpu-v5e:2x2
    usd_per_hour = 2.99             # of one chip
    date = 2026-11-22
    source = "https://..."

Prices are data, never predicted: what is in no table is unknown.
"""

from __future__ import annotations

import datetime
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from trivium.compiler import files
from trivium.compiler.errors import BadInput
from trivium.compiler.types import Target


@dataclass(frozen=True)
class Price:
    """Dollars for an hour of one chip, and where from."""

    usd_per_hour: float
    date: datetime.date
    source: str

    @property
    def said(self) -> str:
        """The source with its day."""
        return f"{self.source} (read {self.date.isoformat()})"


Table = Mapping[str, Price]


def read(path: Path) -> Table:
    """Read a price table of the user's.

    Raises:
        BadInput: It is no such table; the message names the entry.
    """
    files.require_file(path)
    try:
        return parse(path.read_text(encoding="utf-8"), about=str(path))
    except UnicodeDecodeError as error:
        raise BadInput("not a text file", about=str(path)) from error


def parse(text: str, *, about: str) -> Table:
    """Parse a price table; see the module."""
    try:
        document = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise BadInput(f"not TOML: {error}", about=about) from error
    rows = document.get("price")
    if set(document) != {"price"} or not isinstance(rows, list):
        raise BadInput("holds no [[price]] tables, or something else besides", about=about)
    table: dict[str, Price] = {}
    for number, row in enumerate(rows, start=1):
        where = f"{about}, price {number}"
        wanted = {"target", "usd_per_hour", "date", "source"}
        if not isinstance(row, dict) or set(row) != wanted:
            raise BadInput(f"needs exactly {', '.join(sorted(wanted))}", about=where)
        if not isinstance(row["date"], datetime.date) or not isinstance(row["source"], str):
            raise BadInput("the date is a date (2026-11-22), the source a text", about=where)
        usd = row["usd_per_hour"]
        if isinstance(usd, bool) or not isinstance(usd, (int, float)) or not 0 <= usd < math.inf:
            raise BadInput(f"{usd!r} is no price in dollars", about=where)
        if row["target"] in table:
            raise BadInput(f"a second price for {row['target']!r}", about=where)
        table[str(row["target"])] = Price(float(usd), row["date"], row["source"])
    return table


def priced(target: Target, table: Table) -> Target:
    """A target at the price of a table: its slice's, or its device's; else as it is."""
    found = table.get(target.name) or table.get(target.name.partition(":")[0])
    if found is None:
        return target
    sources = {**target.sources, "usd_per_hour": found.said}
    return replace(target, usd_per_hour=found.usd_per_hour, sources=sources)
