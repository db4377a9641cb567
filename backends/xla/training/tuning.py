"""`trivium.tune`: from a model, a recipe and data to the model that was trained back."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from trivium.backends.xla.lowering import lower, precise
from trivium.backends.xla.lowering.lazy import jnp
from trivium.backends.xla.training import augment, losses, optimizers, sparsity, taylor
from trivium.backends.xla.training import data as datasets
from trivium.backends.xla.training.checkpoint import Checkpoint
from trivium.backends.xla.training.loop import Look, Trained, Trainer, Watch
from trivium.backends.xla.training.settings import Settings
from trivium.backends.xla.training.twin import Twin, expose_logits, tap, twin
from trivium.compiler import files, recipe, shapes
from trivium.compiler import model as models
from trivium.compiler.errors import BadInput
from trivium.compiler.recipe import TRAINING, Applied, Context, Recipe, Step
from trivium.compiler.types import Target, Workload
from trivium.passes.coupling.teach import teach

DISTILL, FINETUNE = TRAINING

_REFIT = 512
"""Samples that products are fitted on."""


@dataclass(frozen=True)
class Tuned:
    """A model that was trained, and what it learned.

    Attributes:
        model: The recipe's graph with new weights.
        recipe: Without the words for training.
        applied: What each pass did.
        refitted: How many products were fitted to the teacher before the first update.
        measure: What the scores in ``before`` and ``after`` are, 0 to 1; empty if nothing fits.
        before, after: The held-out samples' word before the first update and on what is returned.
        history: Every look at them.
        stopped: ``finished``, ``early`` or ``diverged``, with a reason unless finished.
        resumed: The update that it went on from; 0 if it ran through.
        matched: How each output was compared with the teacher's.
        sparsity: The share of zeros in the products' weights.
        checkpoint: What the run left, to be forgotten once the model is written.
    """

    model: ir.Model
    recipe: str
    applied: tuple[Applied, ...]
    refitted: int
    measure: str
    before: Look
    after: Look
    history: tuple[Look, ...]
    updates: int
    stopped: str
    reason: str
    resumed: int
    sparsity: float
    matched: Mapping[str, str]
    checkpoint: Checkpoint | None

    def forget(self) -> None:
        """Remove the checkpoint: the model is written, and nothing is left to go on with."""
        if self.checkpoint is not None:
            self.checkpoint.remove()


def _silent(step: int, steps: int, figures: Mapping[str, float]) -> None:
    """A watch that says nothing."""


def tune(
    source: str | os.PathLike[str] | ir.Model,
    data: Any,
    *,
    recipe: str | Recipe = DISTILL,
    out: str | os.PathLike[str] | None = None,
    teacher: str | os.PathLike[str] | ir.Model | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    shape: tuple[str, ...] | list[str] = (),
    target: Target | None = None,
    watch: Watch | None = None,
    **options: Any,
) -> Tuned:
    """Run a recipe on a model and train back what it cost.

    Args:
        source: The model; it is also the teacher unless another is named.
        data: What to learn from: see `trivium.backends.xla.training.data`.
        recipe: Recipes and ``distill`` (learn from the teacher) or ``finetune`` (learn from labels
            alone), joined by ``+``. Without either word it distills.
        out: Where to write the model, besides returning it.
        checkpoint: A folder to keep the state in; a run that finds one goes on from it.
        shape, target: As for `trivium.optimize`.
        watch: Told of the progress.
        options: The fields of `trivium.backends.xla.training.settings.Settings`.

    Raises:
        BadInput: Options that contradict each other, or data that does not fit.
        ToolchainMissing: Without jax and optax.
    """
    optimizers.require()
    settings = _settings(options)
    chosen, distill = _read(recipe, teacher)
    model = _load(source)
    origin = model.clone()
    inputs = models.signature(model)[0]
    learned = datasets.read(data, inputs, settings, tokenizer=_tokenizer(source))
    train, held_out = learned.split(settings.validation, settings.seed)
    updates = settings.steps or max(1, int(settings.epochs * max(1, train.count // settings.batch)))
    shortened, schedule = sparsity.divided(chosen, settings.gradual, updates)
    workload = shapes.parse(shape, inputs)
    context = Context(
        target,
        train.calibration(),
        workload,
        settings.seed,
        target.backend if target is not None else None,
        taylor.provider(train, settings),
    )
    applied = _prepare(model, shortened, context)
    _prepare(origin, Recipe("none", ()), Context(workload=workload))
    taught = _prepared_teacher(teacher, origin, workload) if distill else None
    refitted = _refit(model, taught, train, settings)
    objective, made = _objective(model, origin, taught, learned, settings)
    trainer = Trainer(
        made,
        _teacher(taught, settings) if taught is not None else None,
        objective,
        settings,
        schedule,
        sparsity.masks(made) if sparsity.makes_zeros(shortened) else {},
        train,
        held_out,
        updates,
    )
    kept = None
    if checkpoint is not None:
        kept = Checkpoint(Path(checkpoint), _fingerprint(origin, chosen, taught, learned, settings))
    with precise():
        trained = trainer.run(kept, watch or _silent)
        made.write_back(trained.parameters, trained.masks)
    tuned = _tuned(model, chosen, applied, refitted, trained, objective, updates, kept)
    if out is not None:
        models.save_whole(model, Path(out))
        tuned.forget()
    return tuned


def _refit(
    model: ir.Model, teacher: ir.Model | None, train: datasets.Data, settings: Settings
) -> int:
    """Fit products to the teacher where that was asked for; return how many."""
    if not settings.refit:
        return 0
    if teacher is None:
        raise BadInput(
            "there is no teacher to fit the weights to",
            about="--refit",
            remedy=f"use {DISTILL} in place of {FINETUNE}",
        )
    feeds = train.calibration(most=_REFIT)
    return len(teach(model, teacher, feeds, exclude=settings.freeze))


def _tuned(
    model: ir.Model,
    chosen: Recipe,
    applied: list[Applied],
    refitted: int,
    trained: Trained,
    objective: losses.Objective,
    updates: int,
    kept: Checkpoint | None,
) -> Tuned:
    return Tuned(
        model,
        chosen.name,
        tuple(applied),
        refitted,
        objective.measure,
        trained.history[0],
        trained.best,
        trained.history,
        updates,
        trained.stopped,
        trained.reason,
        trained.resumed,
        sparsity.zeros(model),
        objective.kinds if objective.distill else {},
        kept,
    )


def _settings(options: Mapping[str, Any]) -> Settings:
    known = set(Settings.__dataclass_fields__)
    for name in options:
        if name not in known:
            raise BadInput(
                f"no option {name!r}", about="tune", remedy=f"known: {', '.join(sorted(known))}"
            )
    return Settings(**options)


def _load(source: str | os.PathLike[str] | ir.Model) -> ir.Model:
    return models.load(source) if isinstance(source, (str, os.PathLike)) else source


def _tokenizer(source: Any) -> Path | None:
    if isinstance(source, (str, os.PathLike)) and files.is_folder(Path(source)):
        return Path(source) / "tokenizer.json"
    return None


def _read(given: str | Recipe, teacher: Any) -> tuple[Recipe, bool]:
    """The recipe without the words for training, and whether there is a teacher."""
    if isinstance(given, Recipe):
        return given, True
    parts = given.split("+") if not given.endswith(".toml") or "+" in given else [given]
    words = {part for part in parts if part in (DISTILL, FINETUNE)}
    if words == {DISTILL, FINETUNE}:
        raise BadInput(
            f"{DISTILL} and {FINETUNE} contradict each other",
            about="--recipe",
            remedy=f"{DISTILL} uses labels too where there are any (see --alpha)",
        )
    if FINETUNE in words and teacher is not None:
        raise BadInput(
            f"{FINETUNE} has no teacher", about="--teacher", remedy=f"use {DISTILL} in its place"
        )
    rest = [part for part in parts if part not in words]
    steps: tuple[Step, ...] = ()
    for part in rest:
        steps += recipe.read(part).steps
    return Recipe("+".join(rest) or "none", steps), FINETUNE not in words


def _prepare(model: ir.Model, chosen: Recipe, context: Context) -> list[Applied]:
    shapes.bind(model, context.workload)
    applied = recipe.run(recipe.read(recipe.NORMALIZE), model, context)
    return applied + recipe.run(chosen, model, context)


def _prepared_teacher(given: Any, origin: ir.Model, workload: Workload) -> ir.Model:
    if given is None:
        return origin
    teacher = _load(given)
    _prepare(teacher, Recipe("none", ()), Context(workload=workload))
    mine, theirs = models.signature(origin), models.signature(teacher)
    for what, ours, others in zip(("inputs", "outputs"), mine, theirs, strict=True):
        names, found = [i.name for i in ours], [i.name for i in others]
        if names != found:
            raise BadInput(
                f"has the {what} {', '.join(found)}, the model {', '.join(names)}",
                about="--teacher",
                remedy="a teacher takes and gives what its student does",
            )
    return teacher


def _objective(
    model: ir.Model,
    origin: ir.Model,
    taught: ir.Model | None,
    learned: datasets.Data,
    settings: Settings,
) -> tuple[losses.Objective, Twin]:
    """The loss, and the twin with whatever the loss looks at among its outputs."""
    if not callable(settings.augment):
        augment.check(settings.augment, labelled=learned.labels is not None)
    pairs = {
        losses.HIDDEN: [_pair(text) for text in settings.hidden],
        losses.ATTENTION: [_pair(text) for text in settings.attention],
    }
    if taught is None and any(pairs.values()):
        raise BadInput(
            "there is no teacher to match them with", about="--hidden or --attention",
            remedy=f"add +{DISTILL} to the recipe",
        )  # fmt: skip
    taps = {f"{kind}{own}": own for kind, some in pairs.items() for own, _ in some}
    made = twin(
        model,
        origin,
        freeze=settings.freeze,
        scales=settings.scales,
        taps=taps,
        logits=_wants_logits(settings),
    )
    objective = losses.objective(
        settings,
        made.graph,
        labelled=learned.labels is not None,
        tokens=learned.tokens,
        distill=taught is not None,
    )
    if taught is not None:
        tap(taught, {f"{kind}{own}": other for kind, some in pairs.items() for own, other in some})
    return objective, made


def _wants_logits(settings: Settings) -> bool:
    """A loss that compares values, not scores, is meant for the probabilities themselves."""
    return settings.loss not in ("mse", "mae", "cosine")


def _pair(text: str) -> tuple[str, str]:
    own, _, other = text.partition("=")
    return own, other or own


def _teacher(model: ir.Model, settings: Settings) -> Callable[[dict[str, Any]], dict[str, Any]]:
    if _wants_logits(settings):
        expose_logits(model)
    lowered = lower(model, quantized="float")
    with precise():
        weights = {name: jnp.asarray(array) for name, array in lowered.read().items()}
    return lambda feeds: lowered.function(weights, feeds)


def _fingerprint(
    origin: ir.Model,
    chosen: Recipe,
    taught: ir.Model | None,
    learned: datasets.Data,
    settings: Settings,
) -> str:
    """All that a tuning depends on; a function given as an option counts by its name."""
    total = hashlib.sha256()
    for model in (origin, taught):
        if model is None:
            continue
        for name, value in sorted(model.graph.initializers.items()):
            total.update(name.encode())
            if value.const_value is not None:
                total.update(value.const_value.tobytes())
    facts = asdict(settings)
    for name in ("loss", "augment"):
        if callable(facts[name]):
            facts[name] = getattr(facts[name], "__qualname__", "function")
    steps = [[step.name, dict(step.options)] for step in chosen.steps]
    total.update(json.dumps([facts, steps], default=str, sort_keys=True).encode())
    total.update(learned.digest.encode())
    return total.hexdigest()
