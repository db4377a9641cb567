"""Work x target -> `Estimate`: the roofline that every backend's cost model starts from.

For each kernel ``t = launch + max(compute, memory)``, with rates that are the data sheet's times
the efficiency that a backend's `Profile` was calibrated to; the call adds a fixed overhead and, on
several chips, the gathering of results. A figure that is unknown makes what depends on it ``None``,
with the reason in ``notes``; nothing here raises for a model that it cannot predict.

Every figure carries an 80% interval: for the latency from the spread of the calibration's
residuals (log-normal), for energy and money from the latency's, for memory from no reuse overhead
to twice the live activations besides caches (what allocators and workspaces add).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from trivium.compiler import model as models
from trivium.compiler.calibration import interval
from trivium.compiler.errors import BadInput, Unsupported
from trivium.compiler.kernels import Fused, Kernel, break_down
from trivium.compiler.machines.base import Context, KernelTime, Machine
from trivium.compiler.passing import is_op
from trivium.compiler.shapes import flag_for, open_dims
from trivium.compiler.types import Bound, Estimate, OpCost, Target, Workload
from trivium.compiler.work import resident_bytes, value_bytes

ELEMENTWISE = (
    *("Add", "Sub", "Mul", "Div", "Mod", "Neg", "Abs", "Sign", "Reciprocal", "Pow", "Sqrt"),
    *("And", "Or", "Xor", "Not", "Where", "Cast", "CastLike", "Min", "Max", "Sum", "Mean"),
    *("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Ceil", "Floor", "Round"),
    *("Exp", "Log", "Erf", "Sin", "Cos", "Tanh", "Sigmoid", "Softplus", "Softsign", "Clip"),
    *("Relu", "LeakyRelu", "PRelu", "ThresholdedRelu", "HardSigmoid", "HardSwish", "Elu"),
    *("Celu", "Selu", "Swish", "Gelu", "Mish", "QuantizeLinear", "BatchNormalization"),
)
"""Operators that every fusing compiler melts into the kernel before them."""


def melts_elementwise(node: ir.Node) -> bool:
    """Fused: elementwise operators melt, everything else is a kernel of its own."""
    return is_op(node, *ELEMENTWISE)


@dataclass(frozen=True)
class Profile:
    """How much of a data sheet an engine reaches, and how well that is known.

    Attributes:
        compute_efficiency: Sustained share of peak operations per second.
        memory_efficiency: Sustained share of peak bytes per second.
        spread: Standard deviation of log(measured / predicted) in the calibration.
        calibration: What it was calibrated on, in words; shown with every prediction.
        launch_s: Cost of one kernel where the target's own is not known.
        call_s: Cost of one call besides its kernels.
        cache_speedup: How much faster than memory the on-chip memory feeds a kernel: activations
            that fit there, and weights too where the whole model does.
        fused: Which operators melt into the kernel before them.
        arithmetic: For a dtype, those in which the engine may do its dense operations, best first;
            by default the dtype itself.
        slowdown: For a dtype, how much less of its peak the engine reaches than of the others'.
        notes: What a reader of any prediction should know.
        machine: Times the kernels instead of the two efficiencies.
    """

    compute_efficiency: float = 1.0
    memory_efficiency: float = 1.0
    spread: float = 0.0
    calibration: str = ""
    launch_s: float = 0.0
    call_s: float = 0.0
    cache_speedup: float = 1.0
    fused: Fused = melts_elementwise
    arithmetic: Mapping[str, Sequence[str]] = field(default_factory=dict)
    slowdown: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    machine: Machine | None = None


def roofline(model: ir.Model, target: Target, workload: Workload, profile: Profile) -> Estimate:
    """Predict one call of a legalized model on a target."""
    inputs = models.signature(model)[0]
    open_ = open_dims(inputs)
    if open_:
        note = f"not predicted: {', '.join(open_)} symbolic; bind with --shape, "
        note += f"e.g. {flag_for(inputs)}"
        return Estimate(None, calibration=profile.calibration, notes=(note,))
    try:
        parts = break_down(model.graph, profile.fused)
    except (BadInput, Unsupported) as error:
        return Estimate(
            None,
            bytes_peak=None,
            calibration=profile.calibration,
            notes=(f"not predicted: {error}",),
        )
    kernels, activations = parts.kernels, parts.activation_bytes
    share, split_note = _share(model, target)
    weights = resident_bytes(model)
    outputs = sum(value_bytes(value) for value in model.graph.outputs)
    context = Context(share, weights + activations * share, profile.arithmetic, profile.slowdown)
    timed = _Timed.of(kernels, target, profile, context)
    link, link_note = _gather_s(outputs, target, share)
    notes = [*profile.notes, *timed.notes, *filter(None, (split_note, link_note))]
    seconds = None
    if timed.seconds is not None and link is not None:
        seconds = profile.call_s + timed.seconds + link
    return _finish(
        target,
        profile,
        seconds,
        timed,
        link or 0.0,
        weights,
        activations * share,
        parts.cache_bytes * share,
        tuple(dict.fromkeys(notes)),
    )


def _share(model: ir.Model, target: Target) -> tuple[float, str]:
    """Which part of the batch each chip takes; the whole of it when it cannot be split."""
    if target.chips == 1:
        return 1.0, ""
    inputs, _ = models.signature(model)
    batches = {info.shape[0] if info.shape else 1 for info in inputs}
    batch = batches.pop() if len(batches) == 1 else 1
    if isinstance(batch, int) and batch % target.chips == 0:
        return 1.0 / target.chips, f"the batch of {batch} is split over {target.chips} chips"
    return 1.0, f"a batch of {batch} cannot be split over {target.chips} chips: one of them works"


def _gather_s(outputs: float, target: Target, share: float) -> tuple[float | None, str]:
    """Bringing the outputs of all chips together over one chip's link."""
    if share == 1.0:
        return 0.0, ""
    if target.link_bytes_per_s is None:
        return None, f"no published link rate of {target.name}"
    return outputs * (1.0 - share) / target.link_bytes_per_s, ""


def time_kernel(
    kernel: Kernel,
    target: Target,
    profile: Profile,
    share: float = 1.0,
    *,
    cached_weights: bool = False,
) -> tuple[KernelTime | None, str]:
    """Time one run of a kernel; ``None`` and the reason where a figure is missing.

    Args:
        share: The part of the batch that this chip takes; weights are read whatever it is.
        cached_weights: Whether the weights stay on chip from call to call.
    """
    activations = kernel.activation_bytes * share
    cached_activations = activations <= (target.on_chip_bytes or 0.0) / 2
    moved = kernel.weight_bytes / (profile.cache_speedup if cached_weights else 1.0)
    moved += activations / (profile.cache_speedup if cached_activations else 1.0)
    operations = sum(kernel.dense.values()) + sum(kernel.vector.values())
    if not moved and not operations:
        return KernelTime(0.0, 0.0, 0.0), ""
    note = ""
    compute = 0.0
    for dtype, count in kernel.dense.items():
        rate = _rate(dtype, target, profile)
        if rate is None:
            return None, f"no published {dtype} rate of {target.name}"
        slower = profile.slowdown.get(dtype, 1.0)
        compute += count * share * slower / (rate * profile.compute_efficiency)
    vector_rate = target.peak_ops.get("float32")
    if vector_rate is not None:
        compute += sum(kernel.vector.values()) * share / (vector_rate * profile.compute_efficiency)
    elif kernel.vector:
        note = "no published rate of the vector unit: elementwise work is timed by its bytes only"
    if target.memory_bytes_per_s is None:
        return None, f"no published memory bandwidth of {target.name}"
    memory = moved / (target.memory_bytes_per_s * profile.memory_efficiency)
    launch = target.launch_s if target.launch_s is not None else profile.launch_s
    return KernelTime(launch, compute, memory), note


def fits_on_chip(held_bytes: float, target: Target) -> bool:
    """Whether weights and live activations stay on chip between calls."""
    return held_bytes <= (target.on_chip_bytes or 0.0) / 2


def _rate(dtype: str, target: Target, profile: Profile) -> float | None:
    for candidate in profile.arithmetic.get(dtype, (dtype,)):
        if candidate in target.peak_ops:
            return target.peak_ops[candidate]
    return None


@dataclass(frozen=True)
class _Roofline:
    """The machine of a profile that has only the two efficiencies."""

    profile: Profile

    def time(
        self, kernels: Sequence[Kernel], target: Target, context: Context
    ) -> tuple[list[KernelTime | None], tuple[str, ...]]:
        cached = fits_on_chip(context.held_bytes, target)
        timed = [
            time_kernel(kernel, target, self.profile, context.share, cached_weights=cached)
            for kernel in kernels
        ]
        notes = dict.fromkeys(note for _, note in timed if note)
        return [timing for timing, _ in timed], tuple(notes)


@dataclass(frozen=True)
class _Timed:
    """All kernels of a call, timed."""

    seconds: float | None
    by_op: tuple[OpCost, ...]
    by_bound: Mapping[Bound, float]
    busy: float
    notes: tuple[str, ...]

    @classmethod
    def of(
        cls, kernels: Sequence[Kernel], target: Target, profile: Profile, context: Context
    ) -> _Timed:
        rows: list[OpCost] = []
        by_bound: dict[Bound, float] = {}
        total: float | None = 0.0
        busy = 0.0
        machine = profile.machine or _Roofline(profile)
        runs: dict[Hashable, float] = {}
        for kernel in kernels:
            runs[kernel.asks] = runs.get(kernel.asks, 0.0) + kernel.times
        distinct = {one.asks: replace(one, times=runs[one.asks]) for one in kernels}
        found, notes = machine.time(list(distinct.values()), target, context)
        timings = dict(zip(distinct, found, strict=True))
        for kernel in kernels:
            timing = timings[kernel.asks]
            if timing is None:
                total = None
                continue
            if timing.seconds == 0.0:
                continue
            seconds = timing.seconds * kernel.times
            total = total + seconds if total is not None else None
            busy += timing.busy * kernel.times
            by_bound[timing.bound] = by_bound.get(timing.bound, 0.0) + seconds
            op_type = "+".join(kernel.op_types)
            rows.append(OpCost(kernel.name, op_type, seconds, kernel.work, timing.bound))
        return cls(total, tuple(rows), by_bound, busy, notes)


def _finish(
    target: Target,
    profile: Profile,
    seconds: float | None,
    timed: _Timed,
    link: float,
    weights: float,
    activations: float,
    caches: float,
    notes: tuple[str, ...],
) -> Estimate:
    peak = weights + activations
    intervals = {"bytes_peak": (peak, peak + activations - caches)}
    if seconds is None:
        return Estimate(
            None,
            bytes_peak=peak,
            by_op=timed.by_op,
            calibration=profile.calibration,
            notes=notes,
            intervals=intervals,
        )
    lo, hi = interval(seconds, profile.spread)
    by_bound = {**timed.by_bound, "link": link}
    by_bound["launch"] = by_bound.get("launch", 0.0) + profile.call_s
    bound: Bound = max(by_bound, key=lambda key: by_bound[key]) if timed.by_op else "none"
    joules, joules_interval, energy_note = energy(target, seconds, lo, hi, timed.busy / seconds)
    dollars = price(target, seconds)
    if joules_interval is not None:
        intervals["joules"] = joules_interval
    if dollars is not None:
        intervals["dollars"] = (dollars * lo / seconds, dollars * hi / seconds)
    price_note = "" if dollars is not None else f"no published price of {target.name}"
    return Estimate(
        seconds,
        lo,
        hi,
        bytes_peak=peak,
        joules=joules,
        dollars=dollars,
        bound=bound,
        by_op=timed.by_op,
        calibration=profile.calibration,
        notes=(*notes, *filter(None, (energy_note, price_note))),
        intervals=intervals,
    )


def energy(
    target: Target, seconds: float, lo: float, hi: float, busy: float
) -> tuple[float | None, tuple[float, float] | None, str]:
    """Joules of one call on all chips: idle + busy share x (cap - idle).

    Without an idle figure the cap is taken for the whole call, and the interval reaches down to
    an idle power of nothing.

    Args:
        busy: The share of the call in which chips compute or move data.
    """
    if target.watts is None:
        return None, None, f"no published power of {target.name}"
    cap = target.watts * target.chips
    if target.idle_watts is not None:
        idle = target.idle_watts * target.chips
        watts = idle + busy * (cap - idle)
        return watts * seconds, (watts * lo, watts * hi), ""
    note = "idle power unknown: energy is that of the power cap for the whole call"
    return cap * seconds, (cap * busy * lo, cap * hi), note


def price(target: Target, seconds: float) -> float | None:
    """Dollars of one call on all chips at the listed price, kept busy."""
    if target.usd_per_hour is None:
        return None
    return target.usd_per_hour * target.chips * seconds / 3600.0


def does_not_fit(estimate: Estimate, target: Target) -> str | None:
    """Why the model does not fit into a chip's memory or fabric, or ``None`` (also if unknown)."""
    peak = estimate.bytes_peak
    if peak is not None and target.memory_bytes is not None and peak > target.memory_bytes:
        return (
            f"needs {peak / 2**30:.2f} GiB of memory, "
            f"a chip of {target.name} has {target.memory_bytes / 2**30:.2f}"
        )
    for name, used in estimate.resources.items():
        available = target.resources.get(name)
        if available is not None and used > available:
            return f"needs {used:.0f} {name}, {target.name} has {available:.0f}"
    return None
