"""Where calibrations are found: the user's, then those that ship, the device's before its family's.

``DEVICE.toml`` and ``FAMILY.toml`` beside this module were written by
``benchmarks/fit_calibrations.py``; what ``trivium calibrate`` writes goes to the
user's folder and comes first.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from trivium.compiler.calibration import Calibration, Scope, folder, from_toml
from trivium.compiler.cost import Profile, melts_elementwise
from trivium.compiler.errors import BadInput
from trivium.compiler.kernels import Fused
from trivium.compiler.machines.cpu import START as CPU_START
from trivium.compiler.machines.cpu import CpuMachine, Habits
from trivium.compiler.machines.gpu_kernels import TABLES, GpuMachine
from trivium.compiler.types import Target
from trivium.targets.host import with_bandwidth

WHOLE_MODEL_SPREAD = 0.1
"""What is added for a whole model, of which the microbenchmarks are pieces: caches and layouts
between them differ."""

OTHER_CPU_SPREAD = 0.4
"""What is added for a CPU on which nobody calibrated: caches, memory and libraries differ."""

_SHIPPED = files("trivium.targets") / "calibrations"


def find(target: Target, table: str) -> Calibration:
    """Return the calibration of a device for one formula.

    Coefficients that the nearer file leaves out are its family's.

    Raises:
        BadInput: No file has the table, not even the family's; or a file is broken.
    """
    name = target.name.partition(":")[0]
    places: tuple[tuple[Mapping[str, Any], str, Scope], ...] = (
        (_users(name), str(folder() / f"{name}.toml"), "device"),
        # What ships for "cpu" was measured on some CPU, not on this one.
        (_shipped(name) if name != target.family else {}, f"calibration {name}", "device"),
        (_shipped(target.family), f"calibration {target.family}", "family"),
    )
    found = [
        from_toml(document[table], f"{about}, {table}", scope)
        for document, about, scope in places
        if table in document
    ]
    if not found:
        raise BadInput(f"no calibration of {table}", about=target.name)
    coefficients: dict[str, float] = {}
    for calibration in reversed(found):
        coefficients |= calibration.coefficients
    nearest = found[0]
    measured = nearest.scope == "device" or not nearest.points
    return Calibration(
        coefficients,
        nearest.spread,
        nearest.basis if measured else f"other devices: {nearest.basis}",
        nearest.date,
        nearest.points,
        nearest.scope,
    )


def _users(name: str) -> Mapping[str, Any]:
    path = folder() / f"{name}.toml"
    try:
        changed = path.stat().st_mtime_ns
    except OSError:
        return {}
    return _read(path, changed)


@lru_cache(maxsize=64)
def _read(path: Path, changed: int) -> Mapping[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(
            f"not readable as TOML: {error}", about=str(path), remedy="calibrate anew, or remove it"
        ) from error


@lru_cache(maxsize=64)
def _shipped(name: str) -> Mapping[str, Any]:
    file = _SHIPPED / f"{name}.toml"
    return tomllib.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def of_family(family: str, table: str) -> Calibration:
    """The calibration that ships for all devices of a family."""
    return from_toml(_shipped(family)[table], f"calibration {family}, {table}", "family")


def gpu_machine(target: Target, gap_s: float = 0.0, **paces: float) -> GpuMachine:
    """The kernel formulas with the coefficients of a GPU."""
    return GpuMachine({name: find(target, name) for name in TABLES}, gap_s, **paces)


def cpu_machine(target: Target, engine: str, habits: Habits) -> CpuMachine:
    """The formula for a CPU with the coefficients and the habits of an engine."""
    calibration = find(target, f"engine_{engine}")
    other = OTHER_CPU_SPREAD if calibration.scope == "family" else 0.0
    spread = math.hypot(calibration.spread, WHOLE_MODEL_SPREAD, other)
    whole = {**CPU_START, **calibration.coefficients}
    calibration = replace(calibration, coefficients=whole, spread=spread)
    return CpuMachine(calibration, habits, with_bandwidth(target).memory_bytes_per_s)


def cpu_profile(
    target: Target,
    engine: str,
    *,
    habits: Habits,
    fused: Fused = melts_elementwise,
    arithmetic: Mapping[str, Sequence[str]],
) -> Profile:
    """How an engine runs kernels on a CPU; what `Profile` says of the arguments holds here."""
    machine = cpu_machine(target, engine, habits)
    return Profile(
        spread=machine.calibration.spread,
        calibration=machine.calibration.basis,
        call_s=machine.calibration["call_s"],
        fused=fused,
        arithmetic=arithmetic,
        machine=machine,
    )


def combined(engine: Calibration, kernels: Mapping[str, Calibration]) -> tuple[float, str]:
    """The spread and the basis of a whole call: the engine's, and on a device without data of its
    own that of its family's kernels besides."""
    product = kernels["product"]
    if product.scope == "device":
        return engine.spread, f"{engine.basis}; kernels: {product.basis}"
    spread = math.hypot(engine.spread, product.spread)
    return spread, f"{engine.basis}; kernels of {product.basis}"
