"""The values that the parts of a compile hand to one another: small, frozen, without behaviour
beyond arithmetic.

Units are SI throughout: seconds, bytes, operations per second (one multiply-accumulate is two
operations), joules, US dollars. A figure that is not known is ``None``, never a guess.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from trivium.compiler.generator import Generator

Family = Literal["cpu", "gpu", "tpu", "fpga"]
Bound = Literal["compute", "memory", "launch", "link", "none"]
Preserves = Literal["exact", "numeric", "lossy"]


@dataclass(frozen=True)
class Target:
    """A device, or a slice of several, and what is known of it.

    Rates and capacities are those of *one* chip; ``chips`` says how many there are.

    Attributes:
        name: ``vendor-device`` or ``vendor-device:slice``, as on the command line.
        backends: Names of the backends that serve it, the default first.
        peak_ops: Dense operations per second by dtype (``float32``, ``bfloat16``, ``int8``, ...).
        on_chip_parts: Caches that each keep a copy of what all units read.
        launch_s: Cost of starting one kernel, seconds.
        base_clock_hz: Guaranteed under load, stated for cards that their power cap slows down;
            ``clock_hz`` is the one that ``peak_ops`` assumes.
        link_bytes_per_s: One way, for each chip, to its neighbours or the host.
        interconnect: What `trivium.compiler.links` must know of a torus: the ``links`` of one
            chip, the length at whose multiples an axis closes into a ring (``rings_of``), ``hop_s``
            from one chip to the next, ``start_s`` of a collective, and the ``efficiency`` of links.
        resources: FPGA fabric: ``lut``, ``ff``, ``dsp``, ``bram_18k``, ``uram``.
        options: What the backend must know and the cost model need not: part number,
            compute capability, topology name.
        sources: Where each figure comes from, by field name.
        notes: Doubts that a reader of a prediction should know of.
    """

    name: str
    family: Family
    backends: tuple[str, ...]
    title: str = ""
    peak_ops: Mapping[str, float] = field(default_factory=dict)
    memory_bytes: float | None = None
    memory_bytes_per_s: float | None = None
    on_chip_bytes: float | None = None
    on_chip_parts: int = 1
    launch_s: float | None = None
    link_bytes_per_s: float | None = None
    interconnect: Mapping[str, float] = field(default_factory=dict)
    watts: float | None = None
    idle_watts: float | None = None
    usd_per_hour: float | None = None
    clock_hz: float | None = None
    base_clock_hz: float | None = None
    units: int | None = None
    resources: Mapping[str, float] = field(default_factory=dict)
    chips: int = 1
    topology: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def backend(self) -> str:
        """The default backend."""
        return self.backends[0]


@dataclass(frozen=True)
class Workload:
    """What one call of the model is: a cost without it has no meaning.

    Attributes:
        dims: Values for the model's symbolic dimensions.
        shapes: Whole shapes for named inputs, where the user gave them.
        buckets: Symbolic dimensions that take one of several sizes, ascending. A backend that
            needs them fixed builds a program for each; `shapes.each` lists them.
        symbolic: Symbolic dimensions that stay so at the user's wish, also on backends that would
            otherwise have them fixed.
        batch, prompt_tokens, new_tokens, concurrency: For generators.
    """

    dims: Mapping[str, int] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    buckets: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    symbolic: tuple[str, ...] = ()
    batch: int = 1
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    concurrency: int = 1


@dataclass(frozen=True)
class Work:
    """Operations and traffic; ``a + b`` is the work of doing both.

    Attributes:
        operations: By dtype of the arithmetic; one multiply-accumulate is two.
        bytes_read, bytes_written: Traffic of activations and weights if nothing stays on chip.
        bytes_resident: Weights that have to be held.
    """

    operations: Mapping[str, float] = field(default_factory=dict)
    bytes_read: float = 0.0
    bytes_written: float = 0.0
    bytes_resident: float = 0.0

    def __add__(self, other: Work) -> Work:
        operations = dict(self.operations)
        for dtype, count in other.operations.items():
            operations[dtype] = operations.get(dtype, 0.0) + count
        return Work(
            operations,
            self.bytes_read + other.bytes_read,
            self.bytes_written + other.bytes_written,
            self.bytes_resident + other.bytes_resident,
        )

    @property
    def total_operations(self) -> float:
        return sum(self.operations.values())

    @property
    def bytes_moved(self) -> float:
        return self.bytes_read + self.bytes_written


@dataclass(frozen=True)
class OpCost:
    """The share of one operator (or of one kind of operator) in an estimate."""

    name: str
    op_type: str
    seconds: float
    work: Work
    bound: Bound


@dataclass(frozen=True)
class Estimate:
    """A prediction with its interval (80%) and the calibration it rests on.

    Attributes:
        seconds: Latency of one call; ``None`` when the figures it needs are unknown.
        lo, hi: The 80% interval around it.
        period_s: Seconds between results when calls are pipelined; ``None`` = ``seconds``.
        bytes_peak: Memory at the worst moment, on one chip.
        resources: What it takes of the FPGA's fabric, by the names of ``Target.resources``.
        calibration: What the prediction was calibrated on, in words.
        intervals: The 80% intervals of the other figures, by field name (``bytes_peak``,
            ``joules``, ``dollars``).
    """

    seconds: float | None
    lo: float | None = None
    hi: float | None = None
    period_s: float | None = None
    bytes_peak: float | None = None
    joules: float | None = None
    dollars: float | None = None
    bound: Bound = "none"
    resources: Mapping[str, float] = field(default_factory=dict)
    by_op: tuple[OpCost, ...] = ()
    calibration: str = ""
    notes: tuple[str, ...] = ()
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class TensorInfo:
    """Name, dtype and shape of an input or output; a symbolic dimension is its name."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Program:
    """One executable of an artifact (a shape bucket, a prefill, a decode)."""

    name: str
    file: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]


@dataclass(frozen=True)
class Built:
    """What a backend left in the folder it was given.

    Attributes:
        programs: The executables, files relative to the folder.
        weights: The file that holds the weights, if one does.
        memory: ``weights_bytes``, ``peak_bytes``, ``per_device_bytes`` as far as known.
        details: Whatever else belongs into the manifest, JSON-serializable.
        notes: What could not be done here, and why.
        generator: How to drive it, where that is not as it was asked for.
        parts: What each part holds, of a model that has several (`trivium.compiler.parts`).
    """

    programs: tuple[Program, ...]
    weights: str | None = None
    memory: Mapping[str, float | None] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    generator: Generator | None = None
    parts: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Candidate:
    """One way to run a model: a target, a backend, a recipe, and what is to be expected of it.

    Attributes:
        batch: Samples in one call, where several batches are compared.
        serving: Of a language model that generates, what `decoder_candidates` says of it; the
            estimate is then of a whole batch of generations, which makes so many ``tokens``.
        quality: The recipe's ``metric``, ``value``, ``drop`` and ``samples``, where it was
            evaluated, or the ``reason`` why it could not be.
        verdict: Why it won or lost; ``wins_if`` says what would have to change for a loser to win.
        pareto: Whether no other candidate is at least as good in every figure.
    """

    target: Target
    backend: str
    recipe: str
    estimate: Estimate | None
    refusals: tuple[str, ...] = ()
    measured: Mapping[str, Any] | None = None
    verdict: str = ""
    batch: int = 1
    quality: Mapping[str, Any] | None = None
    wins_if: str = ""
    pareto: bool = False
    serving: Mapping[str, Any] | None = None
    tokens: int = 0

    @property
    def feasible(self) -> bool:
        return not self.refusals

    @property
    def samples(self) -> int:
        """What throughput, energy and money count: new tokens of generators, samples of others."""
        return self.tokens or self.batch


@dataclass(frozen=True)
class Plan:
    """Ranked candidates; the losers keep the reason why they lost."""

    objective: str
    constraints: Mapping[str, float]
    candidates: tuple[Candidate, ...]

    @property
    def best(self) -> Candidate | None:
        ranked = (c for c in self.candidates if c.verdict == "best")
        return next(ranked, None)
