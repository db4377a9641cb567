"""`trivium calibrate`: measure engines here, or read what somebody published, fit, and write.

What is written is a file of `trivium.compiler.calibration`; the target's cost models find it from
then on (`trivium.targets.calibrations`).
"""

from __future__ import annotations

import datetime
import math
import tempfile
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trivium.compiler import build, files, fitting, microbenchmarks, plugins, prepare, shapes
from trivium.compiler import model as models
from trivium.compiler.calibration import POINTS_AT_MOST, Calibration, folder, spread_of
from trivium.compiler.errors import BadInput, TriviumError, Unsupported
from trivium.compiler.kernels import Kernel, kernels_of
from trivium.compiler.machines import cpu
from trivium.compiler.machines.base import Context
from trivium.compiler.prepare import Progress, silent
from trivium.compiler.types import Target
from trivium.compiler.verify import carried_feeds
from trivium.compiler.work import resident_bytes

if TYPE_CHECKING:
    from trivium.compiler.cost import Profile

CALL_BUDGET_S = 0.2
"""At most, for timing one microbenchmark."""

FIT_S = 2.0
"""Of a budget, for fitting one engine."""

LEAST_POINTS = 10
"""Fewer do not tell six coefficients apart."""


@dataclass(frozen=True)
class Point:
    """A measured call: its kernels as the engine runs them, and its seconds."""

    name: str
    kernels: tuple[Kernel, ...]
    held_bytes: float
    seconds: float


def measure(
    target: Target, budget_s: float = 60.0, progress: Progress = silent
) -> dict[str, Calibration]:
    """Time the microbenchmarks on every engine that runs here, and fit each engine.

    Args:
        target: The host.
        budget_s: Shared evenly by the engines, and what they leave by the others; what did not
            get its turn is left out.

    Raises:
        Unsupported: The target is not this machine, or nothing that runs here can be fitted.
    """
    if target.family != "cpu":
        raise Unsupported(
            "no such hardware is at hand to run microbenchmarks on",
            about=target.name,
            remedy="give published points with --from FILE.csv",
        )
    engines = [name for name in target.backends if _available(name)]
    end = time.perf_counter() + budget_s - FIT_S * len(engines)
    points: dict[str, list[Point]] = {name: [] for name in engines}
    with tempfile.TemporaryDirectory(prefix="trivium-") as folder:
        models = list(microbenchmarks.write(Path(folder)))
        # In strides, so that a budget that is too short still leaves some of each kind.
        order = [models[at] for start in range(3) for at in range(start, len(models), 3)]
        left = {name: list(order) for name in engines}
        # What the quick engines leave of their time is for those that were cut off.
        for _ in range(2):
            waiting = [name for name in engines if left[name]]
            for index, name in enumerate(waiting):
                now = time.perf_counter()
                deadline = now + (end - now) / (len(waiting) - index)
                points[name] += _points(name, target, left[name], deadline, progress)
    found = {}
    for name in engines:
        if len(points[name]) >= LEAST_POINTS:
            found[f"engine_{name}"] = fit_engine(name, target, points[name])
        else:
            progress(f"{name}: only {len(points[name])} points in its time; raise --budget")
    if not found:
        raise Unsupported(
            f"too little was measured in {budget_s:g} s", about=target.name, remedy="--budget 120s"
        )
    return found


def _available(name: str) -> bool:
    if name not in plugins.names("trivium.backends"):
        return False
    backend: Any = plugins.get("trivium.backends", name)
    return backend.available() is None and hasattr(backend, "profile")


def _points(
    engine: str,
    target: Target,
    left: list[tuple[str, Path]],
    deadline: float,
    progress: Progress,
) -> list[Point]:
    """Measure models off the front of a list, until it is empty or the time is over."""
    points: list[Point] = []
    while left and time.perf_counter() < deadline:
        name, path = left.pop(0)
        progress(f"{engine}: {name}")
        try:
            points.append(point(engine, target, name, path, (), CALL_BUDGET_S))
        except TriviumError as error:
            progress(f"{engine}: {name} left out: {error}")
    return points


def point(
    engine: str, target: Target, name: str, path: Path, shape: Sequence[str], budget_s: float
) -> Point:
    """Build a model on an engine, time it, and take its kernels."""
    with tempfile.TemporaryDirectory(prefix="trivium-") as folder:
        artifact = build.compile(
            path, target, out=Path(folder) / "a", backend=engine, shape=shape, use_cache=False
        )
        executable = artifact.load()
        feed = carried_feeds(artifact)[0]
        seconds = quick_decile(lambda: executable.run(feed), budget_s)
    kernels, held = kernels_on(engine, target, path, shape)
    return Point(name, kernels, held, seconds)


def quick_decile(call: Callable[[], object], budget_s: float) -> float:
    """Seconds that a tenth of many calls take at most: what else runs here only adds to them."""
    for _ in range(3):
        call()
    found: list[float] = []
    end = time.perf_counter() + budget_s
    while len(found) < 7 or (time.perf_counter() < end and len(found) < 1000):
        begin = time.perf_counter()
        call()
        found.append(time.perf_counter() - begin)
    return sorted(found)[len(found) // 10]


def kernels_on(
    engine: str, target: Target, path: Path, shape: Sequence[str]
) -> tuple[tuple[Kernel, ...], float]:
    """The kernels of a model after an engine's legalization, and the bytes that they hold."""
    backend: Any = plugins.get("trivium.backends", engine)
    workload = shapes.parse(shape, models.signature(models.load(path))[0])
    model, _ = prepare.optimize(path, shape=shape, target=target, backend=engine)
    prepared = prepare.legalize(model, backend, target, workload)
    profile: Profile = backend.profile(target)
    kernels = tuple(kernels_of(prepared.model.graph, profile.fused))
    held = resident_bytes(prepared.model) + max((k.activation_bytes for k in kernels), default=0.0)
    return kernels, held


def predict(
    points: Sequence[Point], target: Target, profile: Profile, coefficients: Mapping[str, float]
) -> fitting.Array:
    """Seconds of each point by the engine's formula."""
    assert isinstance(profile.machine, cpu.CpuMachine)
    machine = replace(profile.machine, calibration=Calibration(coefficients))
    seconds = []
    for one in points:
        context = Context(1.0, one.held_bytes, profile.arithmetic, profile.slowdown)
        times, notes = machine.time(one.kernels, target, context)
        total = coefficients["call_s"]
        for kernel, kernel_time in zip(one.kernels, times, strict=True):
            if kernel_time is None:
                raise Unsupported("; ".join(notes), about=target.name)
            total += kernel_time.seconds * kernel.times
        seconds.append(total)
    return np.array(seconds)


def fit_engine(engine: str, target: Target, points: Sequence[Point]) -> Calibration:
    """Fit the coefficients of one engine on the host."""
    backend: Any = plugins.get("trivium.backends", engine)
    profile: Profile = backend.profile(target)
    seconds = np.array([one.seconds for one in points])
    prior = {**cpu.START, **_prior(profile)}

    def guess(c: Mapping[str, float]) -> fitting.Array:
        return predict(points, target, profile, c)

    fitted = fitting.fit(guess, seconds, prior, cpu.DEVICE, cpu.BOUNDS)
    each = len(points)
    spread = fitting.spread(guess, seconds, prior, cpu.DEVICE, cpu.BOUNDS, each, fitted)
    basis = (
        f"{len(points)} microbenchmarks of {engine} {_version(backend)} on {target.title}, "
        f"{target.units} cores"
    )
    kept = {name: fitted[name] for name in cpu.DEVICE}
    return Calibration(kept, spread, basis, datetime.date.today().isoformat(), len(points))


def _prior(profile: Profile) -> Mapping[str, float]:
    machine = profile.machine
    return machine.calibration.coefficients if isinstance(machine, cpu.CpuMachine) else {}


def _version(backend: Any) -> str:
    return next(iter(backend.toolchain().values()), "")


# --- published points ----------------------------------------------------------------------------

UNITS = {
    **dict.fromkeys(("seconds", "latency_s"), 1.0),
    **dict.fromkeys(("milliseconds", "latency_ms"), 1e-3),
    **dict.fromkeys(("microseconds", "latency_us"), 1e-6),
}
"""Names of the column of times, and how many seconds one of it is."""

OUTLIER = math.log(2.5)
"""A point this far from the trend of the others is left out, and named."""


@dataclass(frozen=True)
class Published:
    """A fit to published points.

    Attributes:
        left_out: What was not fitted, and why, a line each.
    """

    calibration: Calibration
    left_out: tuple[str, ...]


def from_csv(target: Target, path: Path) -> Published:
    """Fit a GPU's products to rows of ``m,n,k`` and a time.

    The columns may be joined by ``batch`` and ``dtype`` (bfloat16, one for all rows). Of more than
    thirty rows, thirty from the shortest to the longest are fitted and the others tell how well.

    Raises:
        BadInput: Columns are missing, a cell is no number, the times cannot be in the unit that
            the column's name says, there are too few points, or too many are outliers.
        Unsupported: Nothing of this family of targets is fitted to published points.
    """
    from trivium.compiler.machines import gpu

    if target.family != "gpu":
        raise Unsupported(
            f"published points are fitted for GPUs only, and this is of family {target.family}",
            about=target.name,
            remedy="calibrate it on the hardware",
        )
    columns, seconds, dtype = _read_csv(path, target)
    m, n, k, batch = (columns[name] for name in ("m", "n", "k", "batch"))
    peak = target.peak_ops[dtype]
    _check_units(path, 2.0 * m * n * k * batch, seconds, peak)
    chip = gpu.Chip.of(target, peak)
    width = {"float32": 4.0, "float64": 8.0, "int8": 1.0, "float8": 1.0}.get(dtype, 2.0)
    prior = {**gpu.PRODUCT_START, **_gpu_prior(target)}

    def guess_of(rows: Any, c: Mapping[str, float]) -> fitting.Array:
        return gpu.product(
            m[rows], n[rows], k[rows], chip, c, batch=batch[rows], width=width
        ).seconds

    everything = np.arange(len(seconds))
    order = np.argsort(guess_of(everything, prior), kind="stable")
    rough = fitting.fit(
        lambda c: guess_of(everything, c), seconds, prior, gpu.PRODUCT_DEVICE, gpu.PRODUCT_BOUNDS
    )
    off = np.log(seconds / guess_of(everything, rough))
    bad = np.abs(off - np.median(off)) > OUTLIER
    if bad.mean() > 0.2:
        raise BadInput(
            f"{bad.sum()} of {len(bad)} points are more than {math.exp(OUTLIER):.1f} times off any "
            "trend: these are not times of one kind of kernel",
            about=str(path),
            remedy="give products of one library and dtype, each in a row",
        )
    left_out = tuple(
        f"row {index + 2}: {math.exp(abs(off[index])):.1f} times "
        f"{'above' if off[index] > 0 else 'below'} the trend of the others, left out"
        for index in np.flatnonzero(bad)
    )
    good = order[~bad[order]]
    chosen = good[np.unique(np.linspace(0, len(good) - 1, POINTS_AT_MOST).round().astype(int))]

    def guess(c: Mapping[str, float]) -> fitting.Array:
        return guess_of(chosen, c)

    arguments = (prior, gpu.PRODUCT_DEVICE, gpu.PRODUCT_BOUNDS)
    fitted = fitting.fit(guess, seconds[chosen], *arguments)
    spread = fitting.spread(guess, seconds[chosen], *arguments)
    rest = np.setdiff1d(good, chosen)
    if len(rest) >= LEAST_POINTS:
        errors = np.log(seconds[rest] / guess_of(rest, fitted)).tolist()
        spread = spread_of(errors)
    basis = f"{len(chosen)} products in {dtype} from {path.name}"
    kept = {name: fitted[name] for name in gpu.PRODUCT_DEVICE}
    today = datetime.date.today().isoformat()
    return Published(Calibration(kept, spread, basis, today, len(chosen)), left_out)


def _gpu_prior(target: Target) -> Mapping[str, float]:
    """The coefficients that the target's default backend uses now."""
    for name in target.backends:
        if name in plugins.names("trivium.backends"):
            backend: Any = plugins.get("trivium.backends", name)
            if hasattr(backend, "profile"):
                machine = backend.profile(target).machine
                calibrations = getattr(machine, "calibrations", {})
                if "product" in calibrations:
                    found: Mapping[str, float] = calibrations["product"].coefficients
                    return found
    return {}


def _read_csv(path: Path, target: Target) -> tuple[dict[str, fitting.Array], fitting.Array, str]:
    import csv

    files.require_file(path)
    try:
        rows = list(csv.DictReader(path.read_text(encoding="utf-8-sig").splitlines()))
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"not readable as CSV: {error}", about=str(path)) from error
    names = set(rows[0]) if rows else set()
    unit = sorted(names & set(UNITS))
    missing = sorted({"m", "n", "k"} - names)
    if missing or len(unit) != 1:
        lacking = ", ".join(missing) or f"exactly one of {', '.join(UNITS)}"
        raise BadInput(
            f"lacks {lacking}", about=str(path), remedy="columns m,n,k,latency_us (batch, dtype)"
        )
    if len(rows) < LEAST_POINTS:
        raise BadInput(
            f"{len(rows)} points, {LEAST_POINTS} are the least that six coefficients can be "
            "fitted to",
            about=str(path),
        )
    dtypes = {row.get("dtype") or "bfloat16" for row in rows}
    if len(dtypes) > 1 or not dtypes <= set(target.peak_ops):
        known = ", ".join(target.peak_ops)
        raise BadInput(
            f"dtype {', '.join(sorted(dtypes))}: it has to be one for all rows, of {known}",
            about=str(path),
        )
    columns = {name: _numbers(rows, name, path) for name in "mnk"}
    batches = [{**row, "batch": row.get("batch") or "1"} for row in rows]
    columns["batch"] = _numbers(batches, "batch", path)
    seconds = _numbers(rows, unit[0], path) * UNITS[unit[0]]
    return columns, seconds, dtypes.pop()


def _numbers(rows: Sequence[Mapping[str, str]], name: str, path: Path) -> fitting.Array:
    found = []
    for index, row in enumerate(rows):
        try:
            number = float(row[name])
        except (TypeError, ValueError):
            number = math.nan
        if not 0.0 < number < math.inf:
            raise BadInput(
                f"row {index + 2}: {name} = {row[name]!r} is no number above 0", about=str(path)
            )
        found.append(number)
    return np.array(found)


def _check_units(
    path: Path, operations: fitting.Array, seconds: fitting.Array, peak: float
) -> None:
    """Times that no unit error of a thousand would explain away."""
    best = float((operations / seconds).max())
    if best > 1.3 * peak:
        raise BadInput(
            f"its times mean {best / 1e12:,.1f} Top/s, {best / peak:,.0f} times the peak: they are "
            "in another unit than the column's name says, or of another dtype",
            about=str(path),
            remedy=f"name the column after its unit: {', '.join(UNITS)}",
        )
    if best < peak / 2000.0 or float(np.median(seconds)) > 30.0:
        raise BadInput(
            f"its times mean {best / 1e9:,.2f} Gop/s at best, {peak / best:,.0f} times below the "
            "peak: they are in another unit than the column's name says",
            about=str(path),
            remedy=f"name the column after its unit: {', '.join(UNITS)}",
        )


# --- writing -------------------------------------------------------------------------------------


def default_file(target: Target) -> Path:
    """The user's file for a target."""
    return folder() / f"{target.name.partition(':')[0]}.toml"


def write(path: Path, tables: Mapping[str, Calibration]) -> None:
    """Put tables into a calibration file; others that it has stay."""
    import tomli_w

    before: dict[str, Any] = {}
    if path.is_file():
        try:
            before = tomllib.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise BadInput(f"not readable as TOML: {error}", about=str(path)) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    new = {name: calibration.to_toml() for name, calibration in tables.items()}
    files.write_text(path, tomli_w.dumps(dict(sorted({**before, **new}.items()))))
