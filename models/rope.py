"""Rotary position embeddings (https://arxiv.org/abs/2104.09864) in every scaling that released
checkpoints use: frequencies from config.json, and the tables of cosines and sines.

The arithmetic is in float32, step by step as in transformers' modeling_rope_utils: models were
trained with those very roundings, and at position 100000 another order of operations would turn a
head by a visible angle.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from trivium.compiler.errors import BadInput
from trivium.models.checkpoint import Config


@dataclass(frozen=True)
class Geometry:
    """What a scaling rule may ask for besides its own options.

    Attributes:
        dim: Leading elements of a head that are rotated.
        theta: Base of the geometric series of wavelengths.
        positions: max_position_embeddings.
        trained: original_max_position_embeddings.
    """

    dim: int
    theta: float
    positions: int
    trained: int


@dataclass(frozen=True)
class Scaled:
    """What a scaling rule makes of the options.

    Attributes:
        frequencies: Radians a position, dim / 2 of them.
        factor: On cosines and sines.
        long_frequencies: Instead, for sequences longer than the model was trained on.
    """

    frequencies: np.ndarray[Any, Any]
    factor: float = 1.0
    long_frequencies: np.ndarray[Any, Any] | None = None


Rule = Callable[[Config, Geometry], Scaled]

SCALINGS: dict[str, Rule] = {}
"""rope_type -> rule."""

RENAMED = {"su": "longrope"}
"""What a rope_type was called before."""


@dataclass(frozen=True)
class Rope:
    """A rotary embedding, ready to be tabulated.

    Attributes:
        dim: Leading elements of each head that are rotated; the others pass.
        positions: No sequence may be longer.
        frequencies: Radians a position, dim / 2 of them.
        factor: On cosines and sines (yarn, longrope).
        long_frequencies: For sequences longer than ``trained`` (longrope). Their rows follow the
            first ``trained`` rows of the tables.
        trained: Where the long frequencies take over.
    """

    dim: int
    positions: int
    frequencies: tuple[float, ...]
    factor: float = 1.0
    long_frequencies: tuple[float, ...] | None = None
    trained: int = 0

    def tables(self, name: str) -> tuple[ir.TensorProtocol, ir.TensorProtocol]:
        """Return cosines and sines [rows, dim / 2] as tensors computed when they are read."""
        rows = self.positions + (self.trained if self.long_frequencies else 0)
        shape = ir.Shape([rows, self.dim // 2])

        def lazy(which: str, function: Callable[[Any], Any]) -> ir.LazyTensor:
            def compute() -> ir.TensorProtocol:
                table = function(self._angles()) * np.float32(self.factor)
                return ir.Tensor(table.astype(np.float32), name=f"{name}.{which}")

            return ir.LazyTensor(compute, ir.DataType.FLOAT, shape, name=f"{name}.{which}")

        return lazy("cos", np.cos), lazy("sin", np.sin)

    def _angles(self) -> np.ndarray[Any, Any]:
        places = np.arange(self.positions, dtype=np.float32)
        if self.long_frequencies is None:
            return np.outer(places, np.array(self.frequencies, np.float32))
        short = np.outer(places[: self.trained], np.array(self.frequencies, np.float32))
        return np.concatenate(
            [short, np.outer(places, np.array(self.long_frequencies, np.float32))]
        )


def read(
    options: Config | None,
    *,
    head_dim: int,
    theta: float,
    positions: int,
    fraction: float = 1.0,
    trained: int | None = None,
) -> Rope:
    """Read ``rope_scaling`` or ``rope_parameters``, whose names changed over the years.

    Args:
        options: The table of config.json, if it has one.
        head_dim: Elements of a head.
        theta: rope_theta, if the table has none.
        positions: max_position_embeddings.
        fraction: partial_rotary_factor, if the table has none.
        trained: original_max_position_embeddings, if it stands beside the table.

    Raises:
        Unsupported: A rope_type or an option that is not known.
        BadInput: Options that contradict each other.
    """
    if options is None:
        options = Config({}, "config.json")
    key = "rope_type" if options.has("rope_type") else "type"
    options.ignore("rope_type", "type")
    kind = options.choose(key, "default", [*SCALINGS, *RENAMED])
    kind = RENAMED.get(kind, kind)
    theta = options.get("rope_theta", theta)
    dim = int(head_dim * options.get("partial_rotary_factor", fraction))
    inside = options.get("original_max_position_embeddings", positions)
    geometry = Geometry(dim, theta, positions, trained or inside)
    if dim < 2 or dim % 2 or theta <= 1 or geometry.trained < 1:
        raise BadInput(
            f"rotates {dim} of {head_dim} elements with theta {theta}, trained on "
            f"{geometry.trained} positions",
            about=options.about,
        )
    scaled = SCALINGS[kind](options, geometry)
    options.finish()
    long = scaled.long_frequencies
    return Rope(
        dim=dim,
        positions=positions,
        frequencies=tuple(scaled.frequencies.tolist()),
        factor=scaled.factor,
        long_frequencies=tuple(long.tolist()) if long is not None else None,
        trained=geometry.trained if long is not None else 0,
    )


def scaling(name: str) -> Callable[[Rule], Rule]:
    """Register a rule under its rope_type."""

    def register(rule: Rule) -> Rule:
        if name in SCALINGS:
            raise ValueError(f"two rules for the rope_type {name!r}")
        SCALINGS[name] = rule
        return rule

    return register


def _series(geometry: Geometry) -> np.ndarray[Any, Any]:
    """theta ** (2 i / dim), the plain wavelengths over 2 pi."""
    exponents = np.arange(0, geometry.dim, 2, dtype=np.float32) / np.float32(geometry.dim)
    series: np.ndarray[Any, Any] = np.power(np.float32(geometry.theta), exponents)
    return series


def _factor(options: Config) -> np.float32:
    factor = options.need("factor", float)
    if factor < 1:
        raise BadInput(f"factor is {factor}", about=options.about, remedy="give at least 1")
    return np.float32(factor)


@scaling("default")
def _default(options: Config, geometry: Geometry) -> Scaled:
    return Scaled(np.float32(1) / _series(geometry))


@scaling("linear")
def _linear(options: Config, geometry: Geometry) -> Scaled:
    """Positions squeezed by a factor."""
    return Scaled(np.float32(1) / _series(geometry) / _factor(options))


@scaling("dynamic")
def _dynamic(options: Config, geometry: Geometry) -> Scaled:
    """NTK scaling, which changes nothing within max_position_embeddings.

    Beyond, the frequencies depend on the length at hand; the tables end where that begins.
    """
    options.ignore("factor", "alpha")
    return Scaled(np.float32(1) / _series(geometry))


@scaling("llama3")
def _llama3(options: Config, geometry: Geometry) -> Scaled:
    """Long wavelengths squeezed, short ones kept, a ramp between: Llama 3.1 and later."""
    factor = _factor(options)
    low = options.need("low_freq_factor", float)
    high = options.need("high_freq_factor", float)
    if not 0 < low < high:
        raise BadInput(f"low_freq_factor {low}, high_freq_factor {high}", about=options.about)
    context = geometry.trained
    plain = np.float32(1) / _series(geometry)
    wavelength = np.float32(2 * math.pi) / plain
    squeezed = np.where(wavelength > context / low, plain / factor, plain)
    smooth = (np.float32(context) / wavelength - np.float32(low)) / np.float32(high - low)
    ramp = (1 - smooth) * squeezed / factor + smooth * squeezed
    between = (wavelength >= context / high) & (wavelength <= context / low)
    return Scaled(np.where(between, ramp, squeezed).astype(np.float32))


@scaling("yarn")
def _yarn(options: Config, geometry: Geometry) -> Scaled:
    """YaRN (https://arxiv.org/abs/2309.00071): a ramp over dimensions, and a temperature."""
    factor = _factor_or_ratio(options, geometry)
    low = _dimension_of(options.get("beta_fast", 32.0), geometry)
    high = _dimension_of(options.get("beta_slow", 1.0), geometry)
    if options.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, geometry.dim - 1)
    if low == high:
        high += 0.001
    series = _series(geometry)
    steps = np.arange(geometry.dim // 2, dtype=np.float32)
    kept = 1 - np.clip((steps - np.float32(low)) / np.float32(high - low), 0, 1)
    mixed = (1 / (factor * series)) * (1 - kept) + (1 / series) * kept

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1

    over, under = options.get("mscale", 0.0), options.get("mscale_all_dim", 0.0)
    implied = scale(over) / scale(under) if over and under else scale(1)
    return Scaled(mixed.astype(np.float32), options.get("attention_factor", implied))


def _factor_or_ratio(options: Config, geometry: Geometry) -> np.float32:
    if options.has("factor"):
        return _factor(options)
    options.ignore("factor")
    return np.float32(geometry.positions / geometry.trained)


def _dimension_of(rotations: float, geometry: Geometry) -> float:
    """The dimension that makes so many rotations over the original context."""
    turns = math.log(geometry.trained / (rotations * 2 * math.pi))
    return geometry.dim * turns / (2 * math.log(geometry.theta))


@scaling("longrope")
def _longrope(options: Config, geometry: Geometry) -> Scaled:
    """LongRoPE (https://arxiv.org/abs/2402.13753): two sets of factors on the frequencies."""
    if geometry.trained > geometry.positions:
        raise BadInput(
            f"trained on {geometry.trained} of {geometry.positions} positions", about=options.about
        )
    series = _series(geometry)
    short, long = (_factors(options, key, series.size) for key in ("short_factor", "long_factor"))
    factor = float(_factor_or_ratio(options, geometry))
    implied = math.sqrt(1 + math.log(factor) / math.log(geometry.trained)) if factor > 1 else 1.0
    temperature = options.get("attention_factor", implied)
    return Scaled(1 / (short * series), temperature, 1 / (long * series))


def _factors(options: Config, key: str, count: int) -> np.ndarray[Any, Any]:
    given = options.sizes(key)
    sound = given is not None and all(type(f) in (int, float) and f > 0 for f in given)
    if given is None or not sound or len(given) != count:
        raise BadInput(f"{key} is not a list of {count} positive numbers", about=options.about)
    return np.array(given, np.float32)
