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

Rule = Callable[[Config, "Geometry"], "tuple[np.ndarray[Any, Any], float]"]

SCALINGS: dict[str, Rule] = {}
"""rope_type -> rule for the inverse frequencies and the factor on cosines and sines."""


@dataclass(frozen=True)
class Geometry:
    """What a scaling rule may ask for besides its own options.

    Attributes:
        dim: Leading elements of a head that are rotated.
        theta: Base of the geometric series of wavelengths.
        max_positions: max_position_embeddings.
    """

    dim: int
    theta: float
    max_positions: int


@dataclass(frozen=True)
class Rope:
    """A rotary embedding, ready to be tabulated.

    Attributes:
        dim: Leading elements of each head that are rotated; the others pass.
        positions: Rows of the tables; no sequence may be longer.
        frequencies: Radians a position, dim / 2 of them.
        factor: On cosines and sines (yarn, longrope).
    """

    dim: int
    positions: int
    frequencies: tuple[float, ...]
    factor: float = 1.0

    def tables(self, name: str) -> tuple[ir.TensorProtocol, ir.TensorProtocol]:
        """Return cosines and sines [positions, dim / 2] as tensors computed when they are read."""
        shape = ir.Shape([self.positions, self.dim // 2])

        def lazy(which: str, function: Callable[[Any], Any]) -> ir.LazyTensor:
            def compute() -> ir.TensorProtocol:
                table = function(self._angles()) * np.float32(self.factor)
                return ir.Tensor(table.astype(np.float32), name=f"{name}.{which}")

            return ir.LazyTensor(compute, ir.DataType.FLOAT, shape, name=f"{name}.{which}")

        return lazy("cos", np.cos), lazy("sin", np.sin)

    def _angles(self) -> np.ndarray[Any, Any]:
        positions = np.arange(self.positions, dtype=np.float32)
        return np.outer(positions, np.array(self.frequencies, np.float32))


def read(
    options: Config | None,
    *,
    head_dim: int,
    theta: float,
    max_positions: int,
    fraction: float = 1.0,
) -> Rope:
    """Read ``rope_scaling`` or ``rope_parameters``, whose names changed over the years.

    Args:
        options: The table of config.json, if it has one.
        head_dim: Elements of a head.
        theta: rope_theta, if the table has none.
        max_positions: max_position_embeddings.
        fraction: partial_rotary_factor, if the table has none.

    Raises:
        Unsupported: A rope_type or an option that is not known.
        BadInput: Options that contradict each other.
    """
    if options is None:
        options = Config({}, "config.json")
    kind = options.get("rope_type", options.get("type", "default"))
    options.choose("rope_type" if options.has("rope_type") else "type", kind, SCALINGS)
    theta = options.get("rope_theta", theta)
    dim = int(head_dim * options.get("partial_rotary_factor", fraction))
    if dim < 2 or dim % 2 or theta <= 1:
        raise BadInput(f"rotates {dim} of {head_dim} with theta {theta}", about=options.about)
    frequencies, factor = SCALINGS[kind](options, Geometry(dim, theta, max_positions))
    options.finish()
    return Rope(dim, max_positions, tuple(frequencies.tolist()), factor)


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
def _default(options: Config, geometry: Geometry) -> tuple[np.ndarray[Any, Any], float]:
    return np.float32(1) / _series(geometry), 1.0


@scaling("linear")
def _linear(options: Config, geometry: Geometry) -> tuple[np.ndarray[Any, Any], float]:
    """Positions squeezed by a factor."""
    return np.float32(1) / _series(geometry) / _factor(options), 1.0


@scaling("dynamic")
def _dynamic(options: Config, geometry: Geometry) -> tuple[np.ndarray[Any, Any], float]:
    """NTK scaling, which changes nothing within max_position_embeddings.

    Beyond, the frequencies depend on the length at hand; the tables end where that begins.
    """
    options.ignore("factor", "alpha")
    return np.float32(1) / _series(geometry), 1.0


@scaling("llama3")
def _llama3(options: Config, geometry: Geometry) -> tuple[np.ndarray[Any, Any], float]:
    """Long wavelengths squeezed, short ones kept, a ramp between: Llama 3.1 and later."""
    factor = _factor(options)
    low = options.need("low_freq_factor", float)
    high = options.need("high_freq_factor", float)
    context = options.get("original_max_position_embeddings", geometry.max_positions)
    if not 0 < low < high:
        raise BadInput(f"low_freq_factor {low}, high_freq_factor {high}", about=options.about)
    plain = np.float32(1) / _series(geometry)
    wavelength = np.float32(2 * math.pi) / plain
    squeezed = np.where(wavelength > context / low, plain / factor, plain)
    smooth = (np.float32(context) / wavelength - np.float32(low)) / np.float32(high - low)
    ramp = (1 - smooth) * squeezed / factor + smooth * squeezed
    between = (wavelength >= context / high) & (wavelength <= context / low)
    return np.where(between, ramp, squeezed).astype(np.float32), 1.0


@scaling("yarn")
def _yarn(options: Config, geometry: Geometry) -> tuple[np.ndarray[Any, Any], float]:
    """YaRN (https://arxiv.org/abs/2309.00071): a ramp over dimensions, and a temperature."""
    context = options.get("original_max_position_embeddings", geometry.max_positions)
    if options.has("factor"):
        factor = _factor(options)
    else:
        factor = np.float32(geometry.max_positions / context)
    low = _dimension_of(options.get("beta_fast", 32.0), context, geometry)
    high = _dimension_of(options.get("beta_slow", 1.0), context, geometry)
    if options.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, geometry.dim - 1)
    if low == high:
        high += 0.001
    series = _series(geometry)
    steps = np.arange(geometry.dim // 2, dtype=np.float32)
    kept = 1 - np.clip((steps - np.float32(low)) / np.float32(high - low), 0, 1)
    mixed = (1 / (factor * series)) * (1 - kept) + (1 / series) * kept
    return mixed.astype(np.float32), _yarn_temperature(options, float(factor))


def _dimension_of(rotations: float, context: int, geometry: Geometry) -> float:
    """The dimension that makes so many rotations over the original context."""
    turns = math.log(context / (rotations * 2 * math.pi))
    return geometry.dim * turns / (2 * math.log(geometry.theta))


def _yarn_temperature(options: Config, factor: float) -> float:
    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1

    over, under = options.get("mscale", 0.0), options.get("mscale_all_dim", 0.0)
    implied = scale(over) / scale(under) if over and under else scale(1)
    return options.get("attention_factor", implied)
