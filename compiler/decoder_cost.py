"""What a language model costs to serve: first token, tokens a second, memory, the batch that fits.

A decoder is given caches as a compile would give them; its calls (a prompt, one token against a
cache of any length, a few tokens to check a draft) are priced by the backend's own cost model on
the graph that it would run.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from trivium.compiler import kernels, prepare, shapes
from trivium.compiler import model as models
from trivium.compiler import recipe as recipes
from trivium.compiler import targets as target_names
from trivium.compiler.backend import cache_form
from trivium.compiler.errors import BadInput, Unsupported
from trivium.compiler.generation.recognize import recognize
from trivium.compiler.recipe import Recipe, Step
from trivium.compiler.types import Estimate, Target, Workload
from trivium.compiler.work import resident_bytes

if TYPE_CHECKING:
    import onnx_ir as ir

    from trivium.compiler.backend import Backend
    from trivium.compiler.generator import Form, Generator

PARTS = (0.125, 0.375, 0.625, 0.875)
"""Where a generation is sampled: its steps get longer with the cache."""

USABLE = 0.9
"""Share of a chip's memory that weights and caches may fill; allocators and engines take some."""


@dataclass(frozen=True)
class Speculation:
    """Drafts by a smaller model, checked by the larger one in a single call.

    Attributes:
        draft: The smaller model on the same target.
        tokens: Drafted for each check.
        acceptance: Chance that a drafted token is accepted, the ones before it given.
    """

    draft: Costs
    tokens: int
    acceptance: float

    @property
    def accepted(self) -> float:
        """Tokens for each check, the one that the check itself gives included."""
        a = self.acceptance
        if a >= 1.0:
            return self.tokens + 1.0
        return float((1.0 - a ** (self.tokens + 1)) / (1.0 - a))


@dataclass(frozen=True)
class Serving:
    """A prediction; ``None`` where a figure that it needs is unknown, with the reason in ``notes``.

    Attributes:
        first_token_s: From the prompts' arrival to the first token of all of them.
        step_s: Each token after that, the mean over the generation.
        total_s: Until the last token.
        tokens_per_s: New tokens of the whole batch, by ``total_s``.
        intervals: 80%, by field name.
        cache_bytes: Of the batch at its longest.
        bytes_peak: Weights, caches and the activations of the larger call.
        largest_batch: Sequences of this length that fit into a chip.
        rounds: How often the batch has to run for all that are in flight (``concurrency``).
    """

    first_token_s: float | None
    step_s: float | None
    total_s: float | None
    tokens_per_s: float | None
    cache_bytes: float
    weights_bytes: float
    bytes_peak: float | None
    largest_batch: int | None
    rounds: int = 1
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    calibration: str = ""
    notes: tuple[str, ...] = ()


class Graphs:
    """A decoder with caches after a recipe, and what backends make of each of its calls.

    Targets for which a backend runs the same passes share them.

    Args:
        model: After the recipe, its shapes open; left as it is.
        name: Of the model, for errors.
        form: The caches that the backends want, where the model has none.

    Raises:
        Unsupported: No cache can be given to the model.
    """

    def __init__(self, model: ir.Model, name: str, form: Form = "static") -> None:
        self.model, self.generator = _with_caches(model.clone(), name, form)
        self._legalized: dict[tuple[str, int, int, int], ir.Model] = {}
        self._steps: dict[tuple[str, int], ir.Model] = {}
        self._passes: dict[tuple[str, int], prepare.Passes] = {}
        self._seen: kernels.Seen = WeakKeyDictionary()

    @cached_property
    def weights_bytes(self) -> float:
        return resident_bytes(self.model)

    def estimate(
        self, backend: Backend, target: Target, batch: int, new: int, context: int
    ) -> Estimate:
        """Price ``new`` tokens of each sequence, against caches of ``context`` (those included).

        Raises:
            Unsupported: The target cannot run it; the error lists the nodes.
        """
        workload = Workload(dims=self._dims(batch, new, context))
        passes = self._decided(backend, target, batch, context)
        key = (prepare.identity(backend, passes), batch, new, context)
        if key not in self._legalized:
            model = self._bound(batch, new, context)
            prepared = prepare.legalize(model, backend, target, workload, passes)
            self._legalized[key] = prepared.model
        else:
            prepared = prepare.judge(self._legalized[key], backend, target, workload)
        if prepared.refusals:
            raise prepare.refused(prepared, target)
        with kernels.remembering(self._seen):
            return prepare.predict(prepared, target)

    def _bound(self, batch: int, new: int, context: int) -> ir.Model:
        model = self.model.clone()
        shapes.bind(model, Workload(dims=self._dims(batch, new, context)))
        return model

    def _decided(
        self, backend: Backend, target: Target, batch: int, context: int
    ) -> prepare.Passes:
        """What the backend runs: as a compile, it picks a mesh once for all calls, on a step.

        The step is against caches of the length that is asked about first.
        """
        key = (prepare.passes_key(backend, target), batch)
        if key not in self._passes:

            def before(passes: prepare.Passes) -> ir.Model:
                of = (prepare.identity(backend, passes), batch)
                if of not in self._steps:
                    self._steps[of] = self._bound(batch, 1, context)
                    recipes.apply(passes, self._steps[of])
                return self._steps[of]

            with kernels.remembering(self._seen):
                self._passes[key] = prepare.decided(backend.legalize(target), before)
        return self._passes[key]

    def _dims(self, batch: int, new: int, context: int) -> dict[str, int]:
        generator = self.generator
        infos = {info.name: info for info in models.signature(self.model)[0]}
        rows, tokens = infos[generator.tokens].shape
        sizes: dict[int | str, int] = {rows: batch, tokens: new}
        held = context - new if generator.form == "growing" else context
        for cache in generator.caches:
            sizes[cache.shape[cache.length_axis]] = held
        for name in filter(None, (generator.chosen, generator.start)):
            sizes.setdefault(infos[name].shape[0], 1)
        if generator.mask is not None:
            sizes.setdefault(infos[generator.mask].shape[-1], context)
        return {dim: size for dim, size in sizes.items() if isinstance(dim, str)}


def normalized(path: str | os.PathLike[str]) -> ir.Model:
    """A model in normal form with its shapes open."""
    return prepare.optimize(Path(path))[0]


def after(
    recipe: Recipe, model: ir.Model, context: recipes.Context | None = None
) -> tuple[ir.Model, bool]:
    """A model in normal form after a recipe, as `Graphs` take it, and whether that did nothing."""
    made = model.clone()
    applied = recipes.sketch(recipe, made, context)
    return made, recipes.changes_nothing(applied)


class Costs:
    """A decoder on a target: the estimate of each of its calls, kept once made.

    Args:
        path: A checkpoint folder, or an ``.onnx`` decoder.
        recipe: Run before the backend's own passes.
        graphs: Of the decoder after the recipe, where they were made already.

    Raises:
        Unsupported: No cache can be given to the model.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        target: str | Target,
        backend: str | None = None,
        recipe: str | Recipe = "none",
        *,
        graphs: Graphs | None = None,
    ) -> None:
        self.target = target_names.find(target) if isinstance(target, str) else target
        self.backend: Backend = prepare.choose_backend(self.target, backend)
        if graphs is None:
            chosen = recipes.read(recipe) if isinstance(recipe, str) else recipe
            context = recipes.Context(target=self.target, backend=self.backend.name)
            model, _ = after(chosen, normalized(path), context)
            graphs = Graphs(model, Path(path).name, cache_form(self.backend) or "static")
        self.graphs, self.generator = graphs, graphs.generator
        self._memo: dict[tuple[int, int, int], Estimate] = {}

    @property
    def weights_bytes(self) -> float:
        return self.graphs.weights_bytes

    @property
    def cache_dtype(self) -> str:
        """What keys and values are held in, as a compile leaves them."""
        return ", ".join(dict.fromkeys(cache.dtype for cache in self.generator.caches))

    def cache_bytes(self, batch: int, tokens: int) -> float:
        """Of a batch whose sequences are so long."""
        each = sum(cache.bytes_per_token for cache in self.generator.caches)
        return float(each) * batch * tokens

    def call(self, batch: int, new: int, context: int) -> Estimate:
        """Price ``new`` tokens of each sequence, against caches of ``context`` (those included)."""
        key = (batch, new, context)
        if key not in self._memo:
            self._memo[key] = self.graphs.estimate(self.backend, self.target, *key)
        return self._memo[key]


def _with_caches(model: ir.Model, name: str, form: Form) -> tuple[ir.Model, Generator]:
    found = recognize(model)
    if found is None:
        options = {"form": form, "outputs": "chosen"}
        step = Recipe("generator", (Step("insert-kv-cache", options),))
        (applied,) = recipes.run(step, model, recipes.Context())
        found = recognize(model) if applied.modified else None
        if found is None:
            raise Unsupported(
                f"no cache can be given to it: {'; '.join(applied.declined) or 'no attention'}",
                about=name,
                remedy="compare it as a model of whole sequences",
            )
    return model, found


def predict(costs: Costs, workload: Workload, speculation: Speculation | None = None) -> Serving:
    """Predict a batch of generations: ``workload`` has prompt and new tokens, batch, concurrency.

    Raises:
        BadInput: The workload lacks the prompt or the new tokens.
    """
    prompt, new, batch = workload.prompt_tokens, workload.new_tokens, workload.batch
    if not prompt or not new or batch < 1:
        raise BadInput(
            "a generation needs the tokens of its prompt, those to generate, and a batch",
            about="workload",
        )
    context = prompt + new
    first = costs.call(batch, prompt, prompt)
    steps = [_step(costs, batch, prompt + int(new * part), speculation) for part in PARTS]
    cache = costs.cache_bytes(batch, context)
    largest = _largest_batch(costs, batch, prompt, context)
    rounds = math.ceil(workload.concurrency / batch)
    notes = (*first.notes, *(note for step in steps for note in step.notes))
    made = Serving(
        first.seconds,
        None,
        None,
        None,
        cache,
        costs.weights_bytes,
        _peak(costs, batch, prompt, context),
        largest,
        rounds,
        {},
        first.calibration,
        tuple(dict.fromkeys(notes)),
    )
    seconds = [one.seconds for one in steps]
    if first.seconds is None or any(one is None for one in seconds):
        return made
    step = sum(one for one in seconds if one is not None) / len(seconds)
    total = (first.seconds + step * (new - 1)) * rounds
    wide = (first.hi or first.seconds) / first.seconds
    figures = {
        "first_token_s": first.seconds,
        "step_s": step,
        "total_s": total,
        "tokens_per_s": batch * new * rounds / total,
    }
    bounds = {name: (value / wide, value * wide) for name, value in figures.items()}
    if unfit := does_not_fit(made, costs.target, batch, context):
        made = replace(made, notes=(*made.notes, f"a batch of {batch} does not fit: {unfit}"))
    return replace(
        made,
        step_s=figures["step_s"],
        total_s=figures["total_s"],
        tokens_per_s=figures["tokens_per_s"],
        intervals=bounds,
    )


def _step(costs: Costs, batch: int, context: int, speculation: Speculation | None) -> Estimate:
    """One token of each sequence, or what a round of drafting and checking takes for each."""
    if speculation is None:
        return costs.call(batch, 1, context)
    check = costs.call(batch, speculation.tokens + 1, context + speculation.tokens)
    draft = speculation.draft.call(batch, 1, context)
    if check.seconds is None or draft.seconds is None:
        return replace(check, seconds=None)
    rounds = check.seconds + speculation.tokens * draft.seconds
    return replace(check, seconds=rounds / speculation.accepted)


def _peak(costs: Costs, batch: int, prompt: int, context: int) -> float | None:
    """On one chip: the prompt's call, beside caches that have room for all that is generated."""
    peak = costs.call(batch, prompt, prompt).bytes_peak
    if peak is None:
        return None
    room = costs.cache_bytes(batch, context) - costs.cache_bytes(batch, prompt)
    return peak + room / costs.target.chips


def _largest_batch(costs: Costs, batch: int, prompt: int, context: int) -> int | None:
    """How many sequences fit beside the weights, with what a prefill of them holds live."""
    memory, peak = costs.target.memory_bytes, _peak(costs, batch, prompt, context)
    if memory is None or peak is None:
        return None
    fixed = costs.weights_bytes
    if costs.target.chips > 1:
        # What a chip has of the weights is not told: two batches tell what a sequence takes.
        one = _peak(costs, 1, prompt, context) if batch > 1 else None
        if one is None or one >= peak:
            return None
        fixed = one - (peak - one) / (batch - 1)
    each = (peak - fixed) / batch
    return max(int((memory * USABLE - fixed) // each), 0)


def does_not_fit(serving: Serving, target: Target, batch: int, context: int) -> str:
    """Why a batch does not fit into a chip beside the weights; empty where it does, or unknown."""
    peak, memory = serving.bytes_peak, target.memory_bytes
    if peak is None or memory is None or peak <= memory * USABLE:
        return ""
    fits = serving.largest_batch
    room = "not one sequence" if not fits else f"{fits} sequence{'s' if fits > 1 else ''}"
    rest = f": {room} of {context} tokens would fit" if fits is not None and fits < batch else ""
    return (
        f"needs {peak / 2**30:.2f} GiB of memory, and of the {memory / 2**30:.2f} of a chip of "
        f"{target.name} {USABLE:.0%} can be used{rest}"
    )
