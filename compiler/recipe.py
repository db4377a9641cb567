"""Recipes: an ordered list of passes with options, read from TOML, run, and locked.

::

    name = "int8"
    description = "..."
    [[pass]]
    name = "quantize-static"
    method = "entropy"

The lock of a run is a recipe with every option spelled out, plus what the run rested on; it is
itself a recipe file, and replaying it on the same model gives the same bytes.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trivium.compiler import files, plugins
from trivium.compiler.errors import BackendFailed, BadInput, blaming
from trivium.compiler.types import Preserves, Target, Workload

if TYPE_CHECKING:
    import onnx_ir as ir

    from trivium.compiler.backend import Tensors

NORMALIZE = "normalize"
"""The recipe that brings any model to normal form; every compile begins with it."""

TRAINING = ("distill", "finetune")
"""Words that `trivium.tune` takes in a recipe, joined by ``+``, and nothing else does."""

_ORDER: tuple[Preserves, ...] = ("exact", "numeric", "lossy")


@dataclass(frozen=True)
class Step:
    """One pass of a recipe and the options that it is given."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """An ordered list of passes with options."""

    name: str
    steps: tuple[Step, ...]
    description: str = ""
    lock: Mapping[str, Any] = field(default_factory=dict)

    @property
    def preserves(self) -> Preserves:
        """The weakest promise among its passes."""
        promises = [plugins.get("trivium.passes", step.name).preserves for step in self.steps]
        return max(promises, key=_ORDER.index, default="exact")


def split(chosen: Recipe) -> tuple[Recipe, Recipe]:
    """Cut a recipe in two: what may run before a decoder is given caches, and the rest, from the
    first pass on that has to see them."""
    classes = [plugins.get("trivium.passes", step.name) for step in chosen.steps]
    seeing = (i for i, cls in enumerate(classes) if getattr(cls, "sees_caches", False))
    cut = next(seeing, len(classes))
    steps = chosen.steps[:cut], chosen.steps[cut:]
    return (
        dataclasses.replace(chosen, steps=steps[0]),
        dataclasses.replace(chosen, steps=steps[1]),
    )


@dataclass(frozen=True)
class Context:
    """What passes may ask for besides the model (fields made with ``from_context``).

    Attributes:
        target: The device compiled for, if any.
        backend: The name of the backend that the graph is meant for, if that is known.
        calibration: Feeds of representative inputs; may be iterated more than once.
        workload: Shapes that the user bound.
        seed: Of whatever a pass draws at random.
        gradients: From a model to the gradients of a loss by its weights' names, batch by batch;
            only where something can differentiate, as `trivium.tune` can.
    """

    target: Target | None = None
    calibration: Iterable[Tensors] | None = None
    workload: Workload = field(default_factory=Workload)
    seed: int = 0
    backend: str | None = None
    gradients: Callable[[ir.Model], Iterator[Mapping[str, Any]]] | None = None


def asks_for(chosen: Recipe, name: str) -> bool:
    """Whether a pass of a recipe has a field that the context's ``name`` fills in."""
    classes = (plugins.get("trivium.passes", step.name) for step in chosen.steps)
    return any(f.metadata.get("context") == name for c in classes for f in dataclasses.fields(c))


def read(name_or_path: str) -> Recipe:
    """Return a recipe by name, from a TOML file, or a chain of them joined by ``+``.

    Raises:
        BadInput: No such recipe, or the file is not one.
    """
    path = Path(name_or_path)
    if path.suffix == ".toml":
        files.require_file(path, remedy="check the path")
        try:
            return parse(path.read_text(encoding="utf-8"), about=str(path))
        except OSError as error:
            raise BadInput(
                f"cannot be read ({error.strerror})", about=str(path), remedy="check the path"
            ) from error
        except UnicodeDecodeError as error:
            raise BadInput("not a text file", about=str(path)) from error
    if "+" in name_or_path:
        parts = [read(part) for part in name_or_path.split("+")]
        steps = tuple(step for part in parts for step in part.steps)
        _refuse_twice(steps, "--recipe")
        return Recipe(name_or_path, steps)
    if name_or_path in TRAINING:
        raise BadInput(
            f"{name_or_path} trains, which no pass does",
            about="--recipe",
            remedy="use trivium tune, and compile what it writes",
        )
    recipe: Recipe = plugins.get("trivium.recipes", name_or_path)
    return recipe


def parse(text: str, *, about: str = "recipe") -> Recipe:
    """Parse a recipe from TOML and check every pass and option in it."""
    try:
        document = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise BadInput(f"not TOML: {error}", about=about) from error
    unknown = set(document) - {"name", "description", "pass", "lock"}
    if unknown:
        raise BadInput(
            f"unknown keys: {', '.join(sorted(unknown))}",
            about=about,
            remedy="a recipe has name, description and [[pass]] tables",
        )
    tables = document.get("pass", [])
    if not isinstance(tables, list) or not all(isinstance(t, dict) and "name" in t for t in tables):
        raise BadInput("every [[pass]] table needs a name", about=about)
    steps = tuple(
        Step(table["name"], {k: v for k, v in table.items() if k != "name"}) for table in tables
    )
    recipe = Recipe(
        str(document.get("name", Path(about).stem)),
        steps,
        str(document.get("description", "")),
        document.get("lock", {}),
    )
    for step in steps:
        instantiate(step, Context(), about=about)
    _refuse_twice(steps, about)
    return recipe


def _refuse_twice(steps: Iterable[Step], about: str) -> None:
    """Refuse a pass that would find its work done by an earlier step of it: those that say by which
    options (``leaving``) they would leave something to a second one."""
    seen: dict[str, Step] = {}
    for step in steps:
        first = seen.setdefault(step.name, step)
        leaving = getattr(plugins.get("trivium.passes", step.name), "leaving", None)
        if first is step or leaving is None or set(leaving) & set(first.options):
            continue
        shown = [", ".join(f"{k}={v}" for k, v in one.options.items()) for one in (first, step)]
        raise BadInput(
            f"{step.name} twice ({shown[0] or 'defaults'}; {shown[1] or 'defaults'}): the second "
            "would find nothing left to do",
            about=about,
            remedy="leave one out",
        )


def instantiate(step: Step, context: Context, *, about: str = "recipe") -> ir.passes.PassBase:
    """Make the pass of a step: options from the recipe, the rest from the context."""
    cls = plugins.get("trivium.passes", step.name)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    options = {name for name, f in fields.items() if "help" in f.metadata}
    given: dict[str, Any] = {}
    for key, value in step.options.items():
        name = key.replace("-", "_")
        if name not in options:
            raise BadInput(
                f"the pass {step.name} has no option {key!r}",
                about=about,
                remedy=f"it has: {', '.join(sorted(options)) or 'none'}",
            )
        given[name] = _checked(step.name, fields[name], value, about)
    for name, f in fields.items():
        if "context" in f.metadata:
            given[name] = getattr(context, f.metadata["context"])
    try:
        made: ir.passes.PassBase = cls(**given)
    except ValueError as error:
        raise BadInput(f"the pass {step.name}: {error}", about=about) from error
    return made


def _checked(step: str, f: dataclasses.Field[Any], value: Any, about: str) -> Any:
    if isinstance(value, list):
        value = tuple(value)
    if isinstance(f.default, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    wrong_type = f.default is not None and type(value) is not type(f.default)
    choices = f.metadata["choices"]
    if wrong_type or (choices and value not in choices):
        wanted = (
            f"one of {', '.join(map(str, choices))}" if choices else f"a {type(f.default).__name__}"
        )
        raise BadInput(
            f"the option {f.name} of {step} is {value!r}", about=about, remedy=f"give {wanted}"
        )
    return value


@dataclass(frozen=True)
class Applied:
    """What a run of a recipe did: one row for each pass."""

    name: str
    modified: bool
    declined: tuple[str, ...]


def sketch(recipe: Recipe, model: ir.Model, context: Context | None = None) -> list[Applied]:
    """Bring a model to the form that `run` would, in place, for a prediction.

    Passes that know how read no weight and no data (`trivium.compiler.passing.sketching`).
    """
    from trivium.compiler.passing import sketched

    with sketched():
        return run(recipe, model, context)


def changes_nothing(applied: Sequence[Applied]) -> bool:
    """Whether passes were run and none of them did anything."""
    return bool(applied) and not any(row.modified for row in applied)


def run(recipe: Recipe, model: ir.Model, context: Context | None = None) -> list[Applied]:
    """Run every pass of a recipe on a model, in place.

    Raises:
        TriviumError: As a pass raises it; anything else that a pass raises becomes
            ``BackendFailed`` naming the pass.
    """
    made = [instantiate(step, context or Context()) for step in recipe.steps]
    return apply(made, model)


def apply(passes: Iterable[ir.passes.PassBase], model: ir.Model) -> list[Applied]:
    """Run passes in order, noting what each declined; no weight stays mapped between them."""
    from trivium.compiler.passing import declining, unmap

    rows = []
    for one in passes:
        name = str(getattr(one, "name", type(one).__name__))
        with declining() as notes, blaming(f"pass {name}"):
            result = one(model)
        if result.model is not model:
            raise BackendFailed("returned another model", about=f"pass {name}")
        unmap(model)
        reasons = tuple(f"{note.where}: {note.reason}" for note in notes)
        rows.append(Applied(name, result.modified, reasons))
    return rows


def lock(recipe: Recipe, *, seed: int, model_sha256: str, calibration: str | None) -> str:
    """Return the lock file of a run: the recipe with every option spelled out."""
    import tomli_w

    tables = []
    for step in recipe.steps:
        made = instantiate(step, Context())
        table: dict[str, Any] = {"name": step.name}
        for f in dataclasses.fields(made):  # type: ignore[arg-type]
            if "help" in f.metadata and getattr(made, f.name) is not None:
                table[f.name] = getattr(made, f.name)
        tables.append(table)
    facts: dict[str, Any] = {"seed": seed, "model_sha256": model_sha256}
    if calibration is not None:
        facts["calibration_sha256"] = calibration
    document = {
        "name": recipe.name,
        "description": recipe.description,
        "pass": tables,
        "lock": facts,
    }
    return tomli_w.dumps(document)
