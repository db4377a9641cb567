"""What a backend is to the compiler: six methods and a name.

A backend is found through the entry points ``trivium.backends``; the compiler never imports one by
name. Vendor SDKs are imported inside the methods that use them, so that listing the backends of a
machine with none of them installed is quick and cannot fail.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from trivium.compiler.generator import Form, Generator
from trivium.compiler.types import Built, Estimate, Target, TensorInfo, Workload

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from trivium.compiler.artifact import Artifact

Tensors = Mapping[str, "np.ndarray[Any, Any]"]


@dataclass(frozen=True)
class BuildRequest:
    """What a backend is asked to build, beside the model.

    Attributes:
        target: The device.
        workload: Shapes that the user bound.
        folder: Where to write; everything the backend needs at run time goes in here.
        samples: A few feeds of real or seeded inputs (name -> array), for golden data and
            warm-up; the verifier uses the same.
        expected: Outputs of the graph before it was legalized, for each sample, by the reference
            engine; empty where no reference run was possible.
        options: Backend options from the command line (``--option key=value``).
        estimate: What the backend's own cost model predicts, if it could.
        generator: How the model is driven, if it is a decoder with caches.
    """

    target: Target
    workload: Workload
    folder: Path
    samples: Sequence[Tensors] = ()
    expected: Sequence[Tensors] = ()
    options: Mapping[str, str] = field(default_factory=dict)
    estimate: Estimate | None = None
    generator: Generator | None = None


class Executable(Protocol):
    """An artifact, loaded and ready.

    Attributes:
        where: What really runs it, in words ("ONNX Runtime 1.32 on this CPU",
            "XLA on the CPU in place of tpu-v5e:2x2"); shown beside every measurement.
        measures_target: Whether timing it says anything about the target: false for a
            simulator or a stand-in.
    """

    where: str
    measures_target: bool

    @property
    def inputs(self) -> Sequence[TensorInfo]: ...

    def run(self, feeds: Tensors) -> dict[str, np.ndarray[Any, Any]]:
        """Run once. Raises ``BadInput`` for a missing, misnamed or misshapen feed."""
        ...


def cache_form(backend: Backend) -> Form | None:
    """The caches that a backend wants of generators; None if it cannot drive them."""
    form: Form | None = getattr(backend, "cache_form", None)
    return form


class Backend(Protocol):
    """An engine that turns a normal-form model into an artifact for its targets.

    One that can drive generators says in an attribute ``cache_form`` which caches it wants; its
    executables then are `trivium.compiler.generation.executable.GeneratorExecutable`.

    One that takes options (``--option``) lists them in ``options``; see `trivium.compiler.options`.

    One that follows a model's annotations of how it is spread over devices has ``spreads`` set, so
    that a planner asks its ``estimate``. One that can show more of its target than ``load`` does,
    at the price of time, has ``load_to_verify`` beside it.
    """

    name: str

    def available(self) -> str | None:
        """Return why the backend cannot build here (and the remedy), or ``None`` if it can."""
        ...

    def toolchain(self) -> dict[str, str]:
        """Return the versions of what it builds with, by package."""
        ...

    def legalize(self, target: Target) -> Sequence[ir.passes.PassBase]:
        """Return the passes that bring normal form to what the engine takes."""
        ...

    def refuses(self, node: ir.Node, target: Target) -> str | None:
        """Return why the engine cannot run a node of the legalized graph, or ``None``."""
        ...

    def estimate(self, model: ir.Model, target: Target, workload: Workload) -> Estimate:
        """Predict one call of a legalized model with its shapes bound. Touches no weight."""
        ...

    # A backend may also have `profile(target) -> Profile`: how it runs kernels, for
    # `trivium calibrate` to fit.

    def build(self, model: ir.Model, request: BuildRequest) -> Built:
        """Write the executable form of a legalized model into ``request.folder``.

        Raises ``BackendFailed`` when the engine does, ``ToolchainMissing`` when a part of it is
        absent, ``Unsupported`` for what only the engine itself could find out.
        """
        ...

    def load(self, artifact: Artifact) -> Executable:
        """Load an artifact onto its target, or onto the nearest stand-in on this machine.

        Raises ``ToolchainMissing`` when nothing here can run it.
        """
        ...
