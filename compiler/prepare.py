"""The part of a compile that needs no vendor's toolchain: normal form, recipe, legalization.

`compare` and ``plan`` go this far and ask the cost model; `trivium.compiler.build` goes on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING

from trivium.compiler import model as models
from trivium.compiler import plugins, recipe, shapes
from trivium.compiler.errors import BackendFailed, BadInput, Unsupported, blaming
from trivium.compiler.feeds import read as read_feeds
from trivium.compiler.passing import Deciding
from trivium.compiler.recipe import Applied, Context, Recipe
from trivium.compiler.types import Estimate, Target, TensorInfo, Workload

if TYPE_CHECKING:
    import onnx_ir as ir

    from trivium.compiler.backend import Backend, Tensors

Progress = Callable[[str], None]
"""Called with the name of each stage as it begins."""


def silent(stage: str) -> None:
    """A progress callback that says nothing."""


@dataclass(frozen=True)
class Prepared:
    """A model on its way to a backend.

    Attributes:
        model: Legalized.
        applied: What each pass did and declined.
        refusals: One line for each node that the backend cannot run.
    """

    model: ir.Model
    backend: Backend
    workload: Workload
    applied: tuple[Applied, ...]
    refusals: tuple[str, ...]
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]


def choose_backend(target: Target, name: str | None) -> Backend:
    """Return the target's default backend, or the named one if it serves the target."""
    if name is not None and name not in target.backends:
        known = plugins.names("trivium.backends")
        problem = f"does not serve {target.name}" if name in known else "is not installed"
        raise BadInput(
            f"the backend {name!r} {problem}",
            about="--backend",
            remedy=f"{target.name} is served by {', '.join(target.backends)}",
        )
    backend: Backend = plugins.get("trivium.backends", name or target.backend)
    return backend


def optimize(
    source: str | os.PathLike[str] | ir.Model,
    recipe_name: str | Recipe = "none",
    *,
    shape: Sequence[str] = (),
    calibration: str | os.PathLike[str] | Iterable[Tensors] | None = None,
    target: Target | None = None,
    backend: str | None = None,
    seed: int = 0,
) -> tuple[ir.Model, list[Applied]]:
    """Bring a model to normal form and run a recipe on it: ONNX in, ONNX out.

    Args:
        source: A path, or a loaded model (which is changed in place).
        recipe_name: A recipe, its name, or a TOML file.
        shape: ``NAME=1x128`` and ``DIM=128`` as on the command line.
        calibration: Feeds for passes that calibrate, an ``.npz`` or a folder of them.
        target, backend: Tell passes that ask what they optimize for; the backend is by default
            that of the target.

    Returns:
        The model, and what each pass did.
    """
    model = models.load(source) if isinstance(source, (str, os.PathLike)) else source
    workload = shapes.parse(shape, models.signature(model)[0])
    backend = target.backend if backend is None and target is not None else backend
    shapes.bind(model, workload)
    data = read_feeds(calibration, models.signature(model)[0]) if calibration is not None else None
    context = Context(target, data, workload, seed, backend)
    return model, run_recipe(model, _read(recipe_name), context)


def _read(given: str | Recipe) -> Recipe:
    return recipe.read(given) if isinstance(given, str) else given


def run_recipe(model: ir.Model, chosen: Recipe, context: Context) -> list[Applied]:
    """Bind the context's shapes, normalize, and run a recipe, in place."""
    shapes.bind(model, context.workload)
    applied = recipe.run(recipe.read(recipe.NORMALIZE), model, context)
    return applied + recipe.run(chosen, model, context)


Passes = Sequence["ir.passes.PassBase"]


def legalize(
    model: ir.Model,
    backend: Backend,
    target: Target,
    workload: Workload,
    passes: Passes | None = None,
) -> Prepared:
    """Bring an optimized model to what a backend takes, in place, and collect its refusals.

    Args:
        passes: The backend's own, as `decided`; by default as it gives them.
    """
    applied = recipe.apply(backend.legalize(target) if passes is None else passes, model)
    return judge(model, backend, target, workload, tuple(applied))


def passes_key(backend: Backend, target: Target) -> str:
    """What tells the graphs that a backend makes for targets apart: the passes that it runs."""
    return identity(backend, backend.legalize(target))


def identity(backend: Backend, passes: Passes) -> str:
    """What tells passes of a backend from others of it."""
    return f"{backend.name} {[_identity(one) for one in passes]}"


def decided(passes: Passes, before: Callable[[Passes], ir.Model]) -> Passes:
    """The passes of a backend with what one of them picks for a target already picked.

    Targets for which the same is picked then share a graph.

    Args:
        before: The graph after so many of them; it is left as it is.
    """
    for index, one in enumerate(passes):
        if isinstance(one, Deciding):
            return (*passes[:index], one.decide(before(passes[:index])), *passes[index + 1 :])
    return passes


def _identity(one: ir.passes.PassBase) -> str:
    """What tells a pass from another: its type, and all that it was made with."""
    made = {f.name: getattr(one, f.name) for f in fields(one)} if is_dataclass(one) else vars(one)
    return f"{type(one).__module__}.{type(one).__qualname__} {made!r}"


def judge(
    model: ir.Model,
    backend: Backend,
    target: Target,
    workload: Workload,
    applied: tuple[Applied, ...] = (),
) -> Prepared:
    """Collect what a backend refuses of a legalized model."""
    refusals = []
    with blaming(f"backend {backend.name}"):
        for node in model.graph.all_nodes():
            reason = backend.refuses(node, target)
            if reason is not None:
                refusals.append(f"{node.name or node.op_type} ({node.op_type}): {reason}")
    inputs, outputs = models.signature(model)
    return Prepared(
        model, backend, workload, applied, tuple(dict.fromkeys(refusals)), inputs, outputs
    )


def predict(prepared: Prepared, target: Target) -> Estimate:
    """Ask the backend's cost model; of several sizes of a dimension, the largest.

    A model that cannot be priced can still be built: the estimate is then unknown, and says why.

    Raises:
        Unsupported: The target cannot hold it.
    """
    workload = shapes.each(prepared.workload)[-1]
    try:
        with blaming(f"cost model of {prepared.backend.name}"):
            return prepared.backend.estimate(prepared.model, target, workload)
    except (BadInput, BackendFailed) as error:
        return Estimate(None, notes=(f"no prediction: {error}",))


def refused(prepared: Prepared, target: Target) -> Unsupported:
    """The error that lists every node a backend cannot run."""
    count = len(prepared.refusals)
    nodes = "1 node" if count == 1 else f"{count} nodes"
    return Unsupported(
        f"{prepared.backend.name} cannot run {nodes}: {_by_reason(prepared.refusals)}",
        about=target.name,
        remedy=_elsewhere(prepared, target),
        refusals=prepared.refusals,
    )


_REASONS, _NAMES = 8, 40
"""How many reasons a line tells, and how many nodes of each; --dry-run has no limit."""


def _by_reason(refusals: Sequence[str]) -> str:
    """Refusals in one line, nodes that are refused for the same reason together."""
    names: dict[str, list[str]] = {}
    for line in refusals:
        name, _, reason = line.partition(" (")
        names.setdefault(reason, []).append(name)
    shown = [
        f"{', '.join(of[:_NAMES])}{' and others' if len(of) > _NAMES else ''} ({reason}"
        for reason, of in list(names.items())[:_REASONS]
    ]
    told = sum(min(len(of), _NAMES) for of in list(names.values())[:_REASONS])
    if told < len(refusals):
        shown.append(f"and {len(refusals) - told} more, which --dry-run lists")
    return "; ".join(shown)


def _elsewhere(prepared: Prepared, target: Target) -> str:
    others = [name for name in target.backends if name != prepared.backend.name]
    if others:
        return f"try --backend {others[0]}"
    return "" if target.family == "cpu" else "try --target cpu"
