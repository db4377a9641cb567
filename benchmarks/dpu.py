"""Vitis AI's published pictures a second on DPUs, predicted by `trivium.compiler.machines.dpu`.

Networks that are not said completely by a paper (`benchmarks.pictures` has those that are), and
rows whose figure is that of a processor's work after the network (detectors, point clouds), are
left out: of them the table says no more than their operations.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from benchmarks import fitting, measured, pictures
from benchmarks.fitting import Array, Coefficients, Formula, Table
from trivium.compiler.calibration import spread_of
from trivium.compiler.machines import dpu
from trivium.compiler.types import Target

ZCU102_BYTES = 1.92e10
"""64 bits of DDR4-2400; recalled and not read again."""

VCK5000_BYTES = 1.024e11
"""Four channels of DDR4-3200; recalled and not read again."""

VCK5000_ULTRARAM = 463 * 36864.0
"""Of the XCVC1902; recalled and not read again."""


def _zcu102(clock: float) -> dpu.Engine:
    """DPUCZDX8G B4096: 8 pixels, 16 channels in, 16 out:
    https://docs.amd.com/r/3.4-English/pg338-dpu/Architecture-of-the-DPUCZDX8G"""
    return dpu.Engine(8, 16, 16, clock, 3, ZCU102_BYTES, shares_weights=False)


def _vck5000(cores: int) -> dpu.Engine:
    """DPUCVDX8H: 64 channels side by side (docs.amd.com/r/3.0-English/ug1414-vitis-ai, operators);
    an AI engine does 128 multiplications a cycle at 1.25 GHz (PG389, of the DPUCVDX8G), and a PE is
    taken to have 32 of them, which is four pixels a cycle of the fabric. How many it really has is
    within ``sustained``."""
    kept = VCK5000_ULTRARAM / cores
    clock, channels = 3.5e8, 64
    return dpu.Engine(4, channels, channels, clock, cores, VCK5000_BYTES, True, feature_bytes=kept)


@dataclass(frozen=True)
class Card:
    """A board with one configuration of its DPU, by what the table says of it."""

    name: str
    board: str
    config: str
    engine: dpu.Engine
    family: str


CARDS = (
    Card("ZCU102, 3 B4096 at 281 MHz", "0432055-05", "3 B4096 @ 281", _zcu102(2.81e8), "zynq"),
    Card("ZCU102, 3 B4096 at 287 MHz", "0432055-04", "3 B4096 @ 287", _zcu102(2.87e8), "zynq"),
    Card("VCK5000, 4 PE", "VCK5000", "DPUCVDX8H running at 4PE", _vck5000(4), "versal"),
    Card("VCK5000, 6 PE, aieDWC", "VCK5000", "aieDWC running at 6PE", _vck5000(6), "versal"),
    Card("VCK5000, 6 PE, aieMISC", "VCK5000", "aieMISC running at 6PE", _vck5000(6), "versal"),
    Card("VCK5000, 8 PE", "VCK5000", "DPUCVDX8H running at 8PE", _vck5000(8), "versal"),
)


@cache
def _layers(pattern: str) -> dpu.Layers:
    return dpu.layers_of(pictures.kernels(pattern))


def _predict(table: Table, c: Coefficients) -> Array:
    engines = {card.name: card.engine for card in CARDS}
    engine = engines[table.target.name]
    rows = zip(table.columns["network"], table.columns["busy"], strict=True)
    return np.array(
        [dpu.seconds(_layers(str(name)), engine, c, int(busy)) / busy for name, busy in rows]
    )


FORMULA = Formula(_predict, dpu.START, dpu.BOUNDS, dpu.DEVICE)


@cache
def tables() -> tuple[Table, ...]:
    """Seconds between pictures, one table for each card."""
    found: dict[str, list[tuple[str, float, float]]] = {}
    for row in measured.rows_of("vitis_ai_2.5/measured_fps.csv"):
        names = [one for one in pictures.NETWORKS if re.fullmatch(one, row["zoo_name"])]
        cards = [one for one in CARDS if one.board in row["board"] and one.config in row["config"]]
        if not names or not cards:
            continue
        for column, busy in (("fps_single", 1.0), ("fps_multi", float(cards[0].engine.cores))):
            if row[column]:
                value = names[0], busy, 1.0 / float(row[column])
                found.setdefault(cards[0].name, []).append(value)
    made = []
    for card in CARDS:
        networks, shares, seconds = zip(*found[card.name], strict=True)
        target = Target(name=card.name, family="fpga", backends=(), clock_hz=card.engine.clock_hz)
        columns = {"network": np.array(networks), "busy": np.array(shares)}
        source = "Vitis AI 2.5"
        made.append(Table("dpu", target, card.family, columns, np.array(seconds), source))
    return tuple(made)


def scored() -> tuple[int, int]:
    """How many figures of the table are predicted, and how many there are."""
    published = sum(
        bool(row[column])
        for row in measured.rows_of("vitis_ai_2.5/measured_fps.csv")
        for column in ("fps_single", "fps_multi")
    )
    return sum(map(len, tables())), published


KINDS = ("inception", "mobilenet", "resnet|personreid|vehicle", "squeezenet", "vgg", "yolo")
"""A network is left out together with those that are like it."""


def kinds(table: Table) -> Array:
    """Of which kind each row's network is."""
    return np.array(
        [
            next(kind for kind in KINDS if re.search(kind, str(name)))
            for name in table.columns["network"]
        ]
    )


@dataclass(frozen=True)
class Way:
    """Predictions for all rows of a card, and the deviation that their interval rests on."""

    guesses: Array
    spreads: Array


def judge() -> Mapping[str, Mapping[str, tuple[Table, Way]]]:
    """By card: without networks of the kind, and without the card as well (of its engine)."""
    everything = tables()
    found: dict[str, dict[str, tuple[Table, Way]]] = {}
    for index, table in enumerate(everything):
        peers = [
            one for at, one in enumerate(everything) if at != index and one.family == table.family
        ]
        found[table.target.name] = {
            "network left out": (table, _left_out(table, peers, [table])),
            "card and network left out": (table, _left_out(table, peers, [])),
        }
    return found


def _left_out(table: Table, peers: Sequence[Table], own: Sequence[Table]) -> Way:
    """Predicted from other kinds of network: the mean of the peers, corrected on the card's own."""
    guesses, spreads = np.zeros(len(table)), np.zeros(len(table))
    for kind in sorted(set(kinds(table).tolist())):
        inside = kinds(table) == kind
        mine = [_without(one, kind) for one in own]
        others = [_without(one, kind) for one in peers]
        guesses[inside] = FORMULA.predict(table.take(np.flatnonzero(inside)), _fit(others, mine))
        spreads[inside] = _spread(others, mine)
    return Way(guesses, spreads)


def _without(table: Table, kind: str) -> Table:
    return table.take(np.flatnonzero(kinds(table) != kind))


def _fit(peers: Sequence[Table], own: Sequence[Table]) -> dict[str, float]:
    prior = fitting.family([_own(one) for one in peers])
    if not own:
        return prior
    return fitting.fit(FORMULA, own, prior, dpu.DEVICE, pull=fitting.FEW_PULL)


_known: dict[tuple[str, bytes], dict[str, float]] = {}


def _own(table: Table) -> dict[str, float]:
    """`fitting.own`, once for each table."""
    key = table.target.name, table.seconds.tobytes()
    if key not in _known:
        _known[key] = fitting.own(FORMULA, table)
    return _known[key]


def _spread(peers: Sequence[Table], own: Sequence[Table]) -> float:
    """What kinds of network say of one another, by the same way of fitting: on the card where it is
    known; else on its peers, each without itself (one alone: without the kind only)."""
    errors: list[float] = []
    for index, table in enumerate(own or peers):
        others = peers if own else [one for at, one in enumerate(peers) if at != index]
        for kind in sorted(set(kinds(table).tolist())):
            rest = [_without(one, kind) for one in others or [table]]
            mine = [_without(table, kind)] if own else []
            inside = table.take(np.flatnonzero(kinds(table) == kind))
            errors += fitting.residuals(FORMULA, inside, _fit(rest, mine)).tolist()
    return spread_of(errors)
