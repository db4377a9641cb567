"""A language model's candidates: its prompt and its steps against caches, on each target.

One candidate is a batch of generations from the prompts' arrival to the last token; its figures of
throughput, energy and money count new tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trivium.compiler import decoder_cost, plugins
from trivium.compiler import recipe as recipes
from trivium.compiler.backend import cache_form
from trivium.compiler.decoder_cost import PARTS, Costs, Graphs, Serving
from trivium.compiler.errors import BadInput, TriviumError
from trivium.compiler.prepare import Progress
from trivium.compiler.rows import NO_CHANGE, noted
from trivium.compiler.types import Bound, Candidate, Estimate, OpCost, Target, Work, Workload

if TYPE_CHECKING:
    import onnx_ir as ir

    from trivium.compiler.generator import Form
    from trivium.compiler.recipe import Recipe

NEW_TOKENS = 128
"""Generated where it is not said how many; half of a context that is shorter than twice that."""

SHORTER = (0.25, 0.5)
"""Shares of the context at which a step is priced besides, to show what its length costs."""


def workload(context: int, new_tokens: int | None, batch: int = 1) -> Workload:
    """What one batch of generations is.

    Args:
        context: Tokens of a sequence at its longest, those of the prompt included.

    Raises:
        BadInput: No prompt is left.
    """
    new = min(NEW_TOKENS, context // 2) if new_tokens is None else new_tokens
    if not 0 < new < context:
        raise BadInput(
            f"a context of {context} tokens leaves no prompt beside {new} new ones",
            about="--context",
            remedy="give a longer context, or fewer --new-tokens",
        )
    return Workload(batch=batch, prompt_tokens=context - new, new_tokens=new)


_After = tuple["ir.Model", bool] | tuple[None, str]
"""A model after a recipe and whether that changed nothing, or why it could not be run."""


@dataclass(frozen=True)
class Decoder:
    """A decoder read once for all recipes and targets."""

    name: str
    model: ir.Model

    @classmethod
    def read(cls, path: Path) -> Decoder:
        return cls(path.name, decoder_cost.normalized(path))

    def candidates(
        self,
        recipe: Recipe,
        pairs: Sequence[tuple[Target, str]],
        loads: Sequence[Workload],
        progress: Progress,
    ) -> Iterator[Candidate]:
        """Price a recipe on targets with backends, for each load."""
        by_target = recipes.asks_for(recipe, "target")
        by_backend = recipes.asks_for(recipe, "backend")
        models: dict[tuple[str, str], _After] = {}
        known: dict[tuple[str, str, Form], Graphs | str] = {}
        for target, name in pairs:
            problem = _cannot(name)
            if problem:
                yield from _refused(target, name, recipe.name, loads, problem)
                continue
            key = (target.name if by_target else "", name if by_backend else "")
            if key not in models:
                progress(" ".join(("recipe", recipe.name, *filter(None, key))))
                models[key] = self._after(recipe, target, name)
            form = cache_form(plugins.get("trivium.backends", name)) or "static"
            if (*key, form) not in known:
                known[*key, form] = self._graphs(models[key], recipe, form)
            progress(f"predicting: {target.name} with {name}")
            unchanged = models[key][1] is True
            for made in _on(known[*key, form], target, name, recipe.name, loads):
                told = unchanged and made.estimate is not None
                yield noted(made, f"{NO_CHANGE} of this model") if told else made

    def _after(self, recipe: Recipe, target: Target, backend: str) -> _After:
        try:
            context = recipes.Context(target=target, backend=backend)
            return decoder_cost.after(recipe, self.model, context)
        except TriviumError as error:
            return None, f"recipe {recipe.name}: {error}"

    def _graphs(self, made: _After, recipe: Recipe, form: Form) -> Graphs | str:
        if made[0] is None:
            return made[1]
        try:
            return Graphs(made[0], self.name, form)
        except TriviumError as error:
            return f"recipe {recipe.name}: {error}"


def _refused(
    target: Target, backend: str, recipe: str, loads: Sequence[Workload], problem: str
) -> Iterator[Candidate]:
    for load in loads:
        yield Candidate(target, backend, recipe, None, refusals=(problem,), batch=load.batch)


def _on(
    graphs: Graphs | str, target: Target, backend: str, recipe: str, loads: Sequence[Workload]
) -> Iterator[Candidate]:
    if isinstance(graphs, str):
        yield from _refused(target, backend, recipe, loads, graphs)
        return
    bare = [Candidate(target, backend, recipe, None, batch=load.batch) for load in loads]
    costs = Costs("", target, backend, graphs=graphs)
    for one, load in zip(bare, loads, strict=True):
        try:
            yield _priced(one, costs, load)
        except TriviumError as error:
            refusals = tuple(getattr(error, "refusals", ())) or (str(error),)
            yield replace(one, refusals=refusals)


def _cannot(backend: str) -> str:
    if backend not in plugins.names("trivium.backends"):
        return f"the backend {backend} is not installed"
    if cache_form(plugins.get("trivium.backends", backend)) is None:
        return (
            f"{backend} cannot drive a generator; --shape prices it as a model of whole sequences"
        )
    return ""


def _priced(candidate: Candidate, costs: Costs, load: Workload) -> Candidate:
    serving = decoder_cost.predict(costs, load)
    prompt, new, batch = load.prompt_tokens or 0, load.new_tokens or 0, load.batch
    first = costs.call(batch, prompt, prompt)
    steps = [costs.call(batch, 1, prompt + int(new * part)) for part in PARTS]
    estimate = _estimate(serving, first, steps, new)
    unfit = decoder_cost.does_not_fit(serving, candidate.target, batch, prompt + new)
    return replace(
        candidate,
        estimate=estimate,
        refusals=(unfit,) if unfit else (),
        serving=_json(serving, load, costs, steps),
        tokens=batch * new,
    )


def _estimate(serving: Serving, first: Estimate, steps: Sequence[Estimate], new: int) -> Estimate:
    """The whole batch of generations as one call."""
    low, high = serving.intervals.get("total_s", (None, None))
    made = Estimate(
        serving.total_s,
        low,
        high,
        bytes_peak=serving.bytes_peak,
        calibration=serving.calibration,
        notes=serving.notes,
    )
    if serving.total_s is None:
        return made
    decoding = serving.total_s - (first.seconds or 0.0)
    middle = steps[len(steps) // 2]
    times = decoding / middle.seconds if middle.seconds else 0.0
    intervals = {}
    sums: dict[str, float | None] = {}
    for name in ("joules", "dollars"):
        of = [getattr(one, name) for one in (first, *steps)]
        known = all(one is not None for one in of)
        sums[name] = of[0] + (new - 1) * sum(of[1:]) / len(steps) if known else None
        pairs = [one.intervals.get(name) for one in (first, middle)]
        if known and pairs[0] is not None and pairs[1] is not None:
            intervals[name] = (
                pairs[0][0] + times * pairs[1][0],
                pairs[0][1] + times * pairs[1][1],
            )
    bound: Bound = middle.bound if decoding > (first.seconds or 0.0) else first.bound
    return replace(
        made,
        joules=sums["joules"],
        dollars=sums["dollars"],
        bound=bound,
        by_op=(*_renamed(first, "prefill", 1.0), *_renamed(middle, "decode", times)),
        intervals=intervals,
    )


def _renamed(estimate: Estimate, phase: str, times: float) -> Iterator[OpCost]:
    for op in estimate.by_op:
        work = op.work
        scaled = Work(
            {dtype: count * times for dtype, count in work.operations.items()},
            work.bytes_read * times,
            work.bytes_written * times,
            work.bytes_resident,
        )
        yield OpCost(op.name, f"{phase}: {op.op_type}", op.seconds * times, scaled, op.bound)


def _json(
    serving: Serving, load: Workload, costs: Costs, steps: Sequence[Estimate]
) -> dict[str, Any]:
    """What a row says of a generation: see docs/planning.md."""
    prompt, new, batch = load.prompt_tokens or 0, load.new_tokens or 0, load.batch
    first = serving.first_token_s
    lengths = [prompt + int(new * part) for part in PARTS]
    along = dict(zip(lengths, steps, strict=True))
    for part in SHORTER:
        length = max(int((prompt + new) * part), 1)
        along.setdefault(length, costs.call(batch, 1, length))
    intervals = {name: list(pair) for name, pair in serving.intervals.items()}
    return {
        "context": prompt + new,
        "prompt_tokens": prompt,
        "new_tokens": new,
        "first_token_s": first,
        "first_token_interval_s": intervals.get("first_token_s"),
        "prefill_tokens_per_s": batch * prompt / first if first else None,
        "step_s": serving.step_s,
        "step_interval_s": intervals.get("step_s"),
        "tokens_per_s": serving.tokens_per_s,
        "tokens_per_s_interval": intervals.get("tokens_per_s"),
        "weights_bytes": serving.weights_bytes,
        "cache_bytes": serving.cache_bytes,
        "cache_dtype": costs.cache_dtype,
        "largest_batch": serving.largest_batch,
        "by_context": [
            {
                "context": length,
                "step_s": one.seconds,
                "tokens_per_s": batch / one.seconds if one.seconds else None,
                "cache_bytes": costs.cache_bytes(batch, length),
            }
            for length, one in sorted(along.items())
        ],
    }
