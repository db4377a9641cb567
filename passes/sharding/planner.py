"""Picking the mesh: every grid of a slice's devices, priced by the backend's own cost model.

The model is annotated for each grid in turn and the backend asked for an estimate, which reads the
annotations as a compile would; so what is chosen is what the estimate of the compile then says.
The fastest that fits wins, but not against the program as the backend spreads it by itself where
that is as fast. Stages only make a call slower, since each waits for the one before it: grids
with more of them are priced only while nothing fits with fewer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir

from trivium.compiler import kernels, links, plugins, shapes
from trivium.compiler.errors import BadInput
from trivium.compiler.model import signature
from trivium.compiler.passing import decline, declining
from trivium.compiler.types import Estimate, Target, Workload
from trivium.passes.sharding.mesh import Mesh, of_size

if TYPE_CHECKING:
    from trivium.compiler.backend import Backend

CLOSE = 1.01
"""How much slower than another a choice may be predicted and still count as fast."""


@dataclass(frozen=True)
class Priced:
    """A mesh (None: as the backend spreads it by itself) and what it is predicted to take."""

    mesh: Mesh | None
    estimate: Estimate

    @property
    def seconds(self) -> float:
        assert self.estimate.seconds is not None
        return self.estimate.seconds

    @property
    def most_bytes(self) -> float:
        """Of one chip, at the upper end of the interval: a mesh that may not fit is no choice."""
        most = self.estimate.intervals.get("bytes_peak", (0.0, 0.0))[1]
        return max(most, self.estimate.bytes_peak or 0.0)

    def fits(self, target: Target) -> bool:
        return target.memory_bytes is None or self.most_bytes <= target.memory_bytes

    def __str__(self) -> str:
        return f"{self.seconds * 1e3:.3g} ms, {self.most_bytes / 2**30:.2f} GiB on each chip"


def choose(
    model: ir.Model,
    target: Target | None,
    backend_name: str | None,
    annotate: Callable[[ir.Model, Mesh], bool],
) -> Mesh | None:
    """Return the mesh to spread a model over, or None to leave that to the backend.

    Why each other one lost is noted as declined, by its name.
    """
    if target is None or links.devices_of(target) == 1:
        return None
    devices = links.devices_of(target)
    if any(one.num_devices == devices for one in model.device_configurations):
        return None
    name = backend_name or target.backend
    if name not in plugins.names("trivium.backends"):
        return None
    backend: Backend = plugins.get("trivium.backends", name)
    if not getattr(backend, "spreads", False):
        _note("auto", f"the backend {name} does not spread a model over devices")
        return None
    model = _with_sizes(model)
    alone = backend.estimate(model, target, Workload())
    if alone.seconds is None:
        _note("auto", f"not picked: {'; '.join(alone.notes)}")
        return None
    tried = [Priced(None, alone)]
    for mesh in of_size(devices):
        if any(one.fits(target) and _stages(one) < mesh.stages for one in tried):
            _note(f"pp>={mesh.stages}", "not priced: it fits with fewer stages, which wait less")
            break
        try:
            estimate = _price(model, mesh, target, backend, annotate)
        except BadInput as error:
            _note(str(mesh), error.cause)
            continue
        if estimate.seconds is None:
            _note(str(mesh), f"not priced: {'; '.join(estimate.notes)}")
        else:
            tried.append(Priced(mesh, estimate))
    return _best(tried, target)


def _with_sizes(model: ir.Model) -> ir.Model:
    """The model, or one with every dimension that takes several sizes at its smallest: 1.

    Of a generator that is the step that decodes a token, which is what it spends its time on.
    """
    sizes = {dim for info in signature(model)[0] for dim in info.shape}
    open_ = sorted(dim for dim in sizes if isinstance(dim, str))
    if not open_:
        return model
    bound = model.clone()
    shapes.bind(bound, Workload(dims=dict.fromkeys(open_, 1)))
    _note("auto", f"priced with 1 for {', '.join(open_)}")
    return bound


def _stages(one: Priced) -> int:
    return one.mesh.stages if one.mesh is not None else 1


def _price(
    model: ir.Model,
    mesh: Mesh,
    target: Target,
    backend: Backend,
    annotate: Callable[[ir.Model, Mesh], bool],
) -> Estimate:
    """Annotate, ask, and take the annotation back."""
    known = model.device_configurations
    before = {node: node.device_configurations for node in model.graph}
    try:
        # The same for all targets with so many devices.
        found = kernels.remembered(
            model.graph, ("annotated", str(mesh)), lambda: _annotated(model, mesh, annotate)
        )
        if isinstance(found, BadInput):
            raise found
        model.device_configurations, of = found
        for node, configurations in of.items():
            node.device_configurations = configurations
        return backend.estimate(model, target, Workload())
    finally:
        for node, configurations in before.items():
            node.device_configurations = configurations
        model.device_configurations = known


_Configurations = tuple[ir.NodeDeviceConfiguration, ...]


def _annotated(
    model: ir.Model, mesh: Mesh, annotate: Callable[[ir.Model, Mesh], bool]
) -> tuple[tuple[ir.ModelConfiguration, ...], dict[ir.Node, _Configurations]] | BadInput:
    """The annotation of a mesh, or why there is none."""
    try:
        with declining():  # what this mesh leaves whole is of interest only if it is chosen
            annotate(model, mesh)
    except BadInput as error:
        return error
    of = {node: tuple(node.device_configurations) for node in model.graph}
    return model.device_configurations, of


def _best(tried: list[Priced], target: Target) -> Mesh | None:
    fitting = [one for one in tried if one.fits(target)]
    if fitting:
        best = min(fitting, key=lambda one: one.seconds)
        alone = tried[0]
        if alone in fitting and alone.seconds <= best.seconds * CLOSE:
            best = alone
    else:
        best = min(tried, key=lambda one: one.most_bytes)
    _note(_name(best), f"chosen: {best}")
    for one in tried:
        if one is best:
            continue
        if fitting and not one.fits(target):
            _note(_name(one), f"does not fit: {one}")
        else:
            _note(_name(one), f"{one}, {one.seconds / best.seconds:.2f} times as long")
    return best.mesh


def _name(one: Priced) -> str:
    return str(one.mesh) if one.mesh is not None else "none"


def _note(mesh: str, reason: str) -> None:
    decline(ir.Value(name=f"mesh {mesh}"), reason)
