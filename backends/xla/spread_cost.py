"""What a call costs when its program is spread over the devices of a slice.

One device computes its share of every operator, at the rates that the roofline has for one; what
the shares need from one another travels over the links. Nothing
overlaps: XLA hides some of the traffic behind compute, but how much was measured nowhere here.
Stages run one after the other, so a call takes all of them and the next may follow after the
slowest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trivium.backends.xla import sharding
from trivium.compiler import kernels, links
from trivium.compiler.calibration import interval
from trivium.compiler.cost import Profile, energy, price, roofline
from trivium.compiler.errors import BadInput, Unsupported
from trivium.compiler.machines import collectives as machines
from trivium.compiler.types import Bound, Estimate, OpCost, Target, Work, Workload
from trivium.compiler.work import value_bytes
from trivium.passes.sharding import stages
from trivium.passes.sharding.share import collectives, local
from trivium.targets import calibrations

if TYPE_CHECKING:
    import onnx_ir as ir

CALIBRATION = "collectives by a model of the links, which was not measured here"


@dataclass(frozen=True)
class _Stage:
    """A stage on its devices: what it computes, sends, and holds."""

    estimate: Estimate
    traffic: tuple[OpCost, ...]

    @property
    def seconds(self) -> float:
        return (self.estimate.seconds or 0.0) + self.link

    @property
    def link(self) -> float:
        return sum(op.seconds for op in self.traffic)


def estimate(model: ir.Model, target: Target, workload: Workload, profile: Profile) -> Estimate:
    """Predict one call of a model that is annotated for as many devices as the target has."""
    devices = links.devices_of(target)
    count = sharding.stages(model, devices)
    timed = []
    for index in range(count):
        part = _stage(model, target, workload, profile, index, count)
        if part.estimate.seconds is None:
            return part.estimate
        timed.append(part)
    return _together(timed, target, profile, count)


def _stage(
    model: ir.Model, target: Target, workload: Workload, profile: Profile, index: int, count: int
) -> _Stage:
    devices = links.devices_of(target)
    key = ("share", sharding.name_of(model, devices), devices, index, count)
    share = kernels.remembered(model.graph, key, lambda: _share(model, devices, index, count))
    if isinstance(share, str):
        return _Stage(Estimate(None, notes=(share,)), ())
    traffic = _traffic(share, target)
    if traffic is None:
        note = f"no published figures of the links of {target.name}"
        return _Stage(Estimate(None, notes=(note,)), ())
    estimate = roofline(share.model, links.per_device(target), workload, profile)
    return _Stage(estimate, traffic)


@dataclass(frozen=True)
class _Share:
    """A stage as one of its devices sees it, whatever the target.

    Attributes:
        travel: What goes over the links: its kind, bytes, and among how many devices.
    """

    model: ir.Model
    travel: tuple[tuple[links.Kind, float, int], ...]


def _share(model: ir.Model, devices: int, index: int, count: int) -> _Share | str:
    """The share of a device, or why there is none."""
    own = stages.Stage(model, (), ())
    if count > 1:
        own = stages.extract(model, index, sharding.name_of(model, devices))
    layout = sharding.read(own.model, devices, index, count)
    assert layout is not None
    try:
        share = local(own.model, layout.mesh, layout.specs)
        asked = collectives(own.model.graph, layout.mesh, layout.specs)
        travel: list[tuple[links.Kind, float, int]] = [(c.kind, c.size, c.devices) for c in asked]
    except (BadInput, Unsupported) as error:
        return f"not predicted: {error}"
    sent = {v.name: v for node in share.graph for v in node.outputs if v.name in own.sent}
    travel += [("send", value_bytes(value), 2) for value in sent.values()]
    return _Share(share, tuple(travel))


def _traffic(share: _Share, target: Target) -> tuple[OpCost, ...] | None:
    """The collectives of a stage and what it sends to later ones, by kind."""
    sums: dict[str, tuple[float, float]] = {}
    for kind, size, devices in share.travel:
        seconds = _seconds(kind, size, devices, target)
        if seconds is None:
            return None
        before = sums.get(kind, (0.0, 0.0))
        sums[kind] = before[0] + seconds, before[1] + size
    return tuple(
        OpCost(kind, kind, seconds, Work(bytes_read=size), "link")
        for kind, (seconds, size) in sums.items()
    )


def _seconds(kind: links.Kind, size: float, devices: int, target: Target) -> float | None:
    """Time of one collective whose result takes so many bytes on a device."""
    if target.family != "gpu":
        return links.seconds(target, kind, size, devices)
    calibration = calibrations.find(target, machines.table(target))
    operation: machines.Collective = "all_reduce" if kind == "all-reduce" else "all_gather"
    whole = 2 * size if kind == "send" else size  # of a gathering over two, half is sent
    found = machines.predict(operation, whole, devices, target, calibration)
    return None if found is None else found.seconds


def _together(timed: list[_Stage], target: Target, profile: Profile, count: int) -> Estimate:
    """The estimate of all stages: one after the other, all devices drawing power and money."""
    seconds = sum(part.seconds for part in timed)
    link = sum(part.link for part in timed)
    lo, hi = interval(seconds, profile.spread)
    worst = max(timed, key=lambda part: part.estimate.bytes_peak or 0.0).estimate
    parts = links.devices_of(target) // target.chips
    peak = (worst.bytes_peak or 0.0) * parts
    most = worst.intervals["bytes_peak"][1] * parts
    # Of all devices, those of one stage work at a time.
    busy = sum(op.seconds for part in timed for op in part.estimate.by_op) / seconds / count
    joules, joules_interval, note = energy(target, seconds, lo, hi, min(busy, 1.0))
    dollars = price(target, seconds)
    intervals: dict[str, tuple[float, float]] = {"bytes_peak": (peak, most)}
    if joules_interval is not None:
        intervals["joules"] = joules_interval
    if dollars is not None:
        intervals["dollars"] = (dollars * lo / seconds, dollars * hi / seconds)
    by_op = tuple(op for part in timed for op in (*part.estimate.by_op, *part.traffic))
    notes = [n for part in timed for n in part.estimate.notes if not n.startswith("no published p")]
    notes.append(f"{link / seconds:.0%} of the time is collectives")
    if count > 1:
        notes.append(f"{count} stages, one after the other; the next call may follow after one")
    price_note = "" if dollars is not None else f"no published price of {target.name}"
    return Estimate(
        seconds,
        lo,
        hi,
        period_s=max(part.seconds for part in timed) if count > 1 else None,
        bytes_peak=peak,
        joules=joules,
        dollars=dollars,
        bound=_bound(by_op, profile.call_s * count),
        by_op=by_op,
        calibration=f"{profile.calibration}; {CALIBRATION}",
        notes=(*dict.fromkeys(notes), *filter(None, (note, price_note))),
        intervals=intervals,
    )


def _bound(by_op: tuple[OpCost, ...], calls: float) -> Bound:
    sums: dict[Bound, float] = {"launch": calls}
    for op in by_op:
        sums[op.bound] = sums.get(op.bound, 0.0) + op.seconds
    return max(sums, key=lambda bound: sums[bound])
