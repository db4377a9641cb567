"""What a machine says of a kernel, and what it has to know of the call around it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from trivium.compiler.kernels import Kernel
    from trivium.compiler.types import Bound, Target


@dataclass(frozen=True)
class KernelTime:
    """Seconds of one run of a kernel, by what they are spent on.

    Attributes:
        body: Of compute and memory together, which overlap; by default the larger.
    """

    launch: float
    compute: float
    memory: float
    body: float | None = None

    @property
    def busy(self) -> float:
        return max(self.compute, self.memory) if self.body is None else self.body

    @property
    def seconds(self) -> float:
        return self.launch + self.busy

    @property
    def bound(self) -> Bound:
        if self.launch > self.busy:
            return "launch"
        return "compute" if self.compute >= self.memory else "memory"


@dataclass(frozen=True)
class Context:
    """The call that kernels are part of.

    Attributes:
        share: The part of the batch that this chip takes.
        held_bytes: Weights and activations that pass through on-chip memory between two uses of
            the same weight.
        dtypes, slowdown: How the engine does its arithmetic, see `trivium.compiler.cost.Profile`.
    """

    share: float = 1.0
    held_bytes: float = 0.0
    dtypes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    slowdown: Mapping[str, float] = field(default_factory=dict)

    def arithmetic(self, dtype: str, known: Mapping[str, float]) -> tuple[str | None, float]:
        """In which dtype the engine multiplies, and how many times over."""
        found = next((one for one in self.dtypes.get(dtype, (dtype,)) if one in known), None)
        return found, self.slowdown.get(dtype, 1.0)


class Machine(Protocol):
    """Times the kernels of a call."""

    def time(
        self, kernels: Sequence[Kernel], target: Target, context: Context
    ) -> tuple[list[KernelTime | None], tuple[str, ...]]: ...
