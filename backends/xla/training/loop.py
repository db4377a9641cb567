"""The training loop: updates, a look at the held-out samples now and then, the best kept.

What comes out is never worse on the held-out samples than what went in: the state before the first
update counts as a candidate. A loss that is no number, or that has left the place it started from
for good, ends the run there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from trivium.backends.xla.lowering.lazy import jax, jnp
from trivium.backends.xla.training import augment, optimizers, sparsity
from trivium.backends.xla.training.checkpoint import Checkpoint
from trivium.backends.xla.training.data import LABELS, Data
from trivium.backends.xla.training.losses import Objective
from trivium.backends.xla.training.settings import Settings
from trivium.backends.xla.training.twin import Parameters, Twin

FAR = 4.0
"""How many times its first value (or its first value and one) a held-out loss may become."""

FEW = 256
"""Held-out samples below which they are also looked at changed, where training changes samples: of
a few dozen, the loss is noise, and the best of many looks would be the luckiest."""

Feeds = dict[str, Any]


class Watch(Protocol):
    """What is told of the progress."""

    def __call__(self, step: int, steps: int, figures: Mapping[str, float], /) -> None:
        """``step`` of ``steps`` updates are done; figures are ``loss`` and the measure."""


@dataclass(frozen=True)
class Look:
    """What the held-out samples said after some updates."""

    step: int
    loss: float
    score: float
    train_loss: float | None


@dataclass(frozen=True)
class Trained:
    """What came of a training.

    Attributes:
        parameters, masks: The best.
        history: Every look at the held-out samples, the first before any update.
        best: The one of the best parameters.
        stopped: ``finished``, ``early`` or ``diverged``.
        reason: Of stopping before the end.
        resumed: The update that a checkpoint let it go on from.
    """

    parameters: Parameters
    masks: dict[str, Any]
    history: tuple[Look, ...]
    best: Look
    stopped: str
    reason: str
    resumed: int


@dataclass
class _State:
    """What changes while training; all of it goes into a checkpoint."""

    parameters: Parameters
    optimizer: Any
    masks: dict[str, Any]
    best: Parameters
    best_masks: dict[str, Any]
    history: list[Look] = field(default_factory=list)
    best_look: Look | None = None


@dataclass(frozen=True)
class Trainer:
    """One training.

    Attributes:
        teacher: Feeds to outputs, or None.
        start_masks: Zeros to hold from the start.
    """

    twin: Twin
    teacher: Callable[[Feeds], Feeds] | None
    objective: Objective
    settings: Settings
    schedule: sparsity.Schedule
    start_masks: dict[str, Any]
    train: Data
    held_out: Data
    updates: int

    def run(self, checkpoint: Checkpoint | None, watch: Watch) -> Trained:
        """Train; to be called inside `precise`."""
        optimizer = optimizers.make(self.settings, self.updates)
        start = {name: jnp.asarray(value) for name, value in self.twin.start.items()}
        state = _State(start, optimizer.init(start), dict(self.start_masks), start, {})
        if self.schedule.steps:
            # Every weight that will lose some gets a mask now: a state has the same form always.
            full = self.schedule.masks(self.twin, start, 1.0)
            state.masks = {**state.masks, **{k: jnp.ones_like(v) for k, v in full.items()}}
        state.best_masks = state.masks
        first = self._resume(state, checkpoint)
        step = jax.jit(self._step(optimizer), donate_argnums=(0, 1))
        look = jax.jit(self._figures)
        every = max(1, self.updates // self.settings.evaluations)
        # Donated buffers are gone after an update; what is kept has to be a copy.
        state.parameters = jax.tree.map(jnp.copy, state.parameters)
        stopped, reason = "finished", ""
        if not state.history:
            self._look(look, state, 0, None)
            watch(0, self.updates, self._shown(state))
        losses: list[float] = []
        for update in range(first, self.updates):
            self._prune(state, update)
            batch = self._batch(update)
            state.parameters, state.optimizer, loss = step(
                state.parameters, state.optimizer, state.masks, batch
            )
            losses.append(float(loss))
            done = update + 1
            if not math.isfinite(losses[-1]):
                stopped, reason = "diverged", f"the loss was {losses[-1]} at update {done}"
                break
            if done % every and done != self.updates:
                watch(done, self.updates, {**self._shown(state), "loss": losses[-1]})
                continue
            self._prune(state, done)
            self._look(look, state, done, float(np.mean(losses)))
            losses = []
            watch(done, self.updates, self._shown(state))
            if checkpoint is not None:
                self._save(state, checkpoint, done)
            stopped, reason = self._verdict(state)
            if reason:
                break
        return self._result(state, stopped, reason, first, look)

    def _result(self, state: _State, stopped: str, reason: str, first: int, look: Any) -> Trained:
        if state.best_look is None:
            # Ended before the sparsity was reached: bring it about on the weights of the start.
            state.masks = {**state.masks, **self.schedule.masks(self.twin, state.best, 1.0)}
            state.parameters, state.best_masks = state.best, state.masks
            state.best_look = self._look(look, state, state.history[-1].step, None)
        return Trained(
            state.best,
            state.best_masks,
            tuple(state.history),
            state.best_look,
            stopped,
            reason,
            first,
        )

    def _shown(self, state: _State) -> dict[str, float]:
        last = state.history[-1]
        figures = {"loss": last.train_loss if last.train_loss is not None else last.loss}
        figures["held-out loss"] = last.loss
        if self.objective.measure:
            figures[self.objective.measure] = last.score
        return figures

    def _prune(self, state: _State, update: int) -> None:
        share = self.schedule.due(update)
        if share is not None:
            made = self.schedule.masks(self.twin, state.parameters, share)
            dense = {name: jnp.ones_like(mask) for name, mask in state.masks.items()}
            state.masks = {**dense, **self.start_masks, **made}

    def _batch(self, update: int) -> Feeds:
        batch: Feeds = self.train.batch(update, self.settings.batch, self.settings.seed)
        return self._changed(np.random.default_rng([self.settings.seed, 3, update]), batch)

    def _changed(self, rng: np.random.Generator, batch: Feeds) -> Feeds:
        """A batch as training varies it."""
        chosen = self.settings.augment
        if not chosen:
            return batch
        fixed = self.train.fixed_batch
        if fixed:
            batch = {name: array.reshape(-1, *array.shape[2:]) for name, array in batch.items()}
        batch = chosen(rng, batch) if callable(chosen) else augment.apply(chosen, rng, batch)
        if fixed:
            batch = {k: v.reshape(-1, fixed, *v.shape[1:]) for k, v in batch.items()}
        return batch

    def _outputs(self, parameters: Parameters, masks: Any, batch: Feeds) -> tuple[Feeds, Feeds]:
        feeds = {name: array for name, array in batch.items() if name != LABELS}
        student = self._each(lambda one: self.twin.run(parameters, masks, one), feeds)
        teacher: Feeds = {}
        if self.teacher is not None:
            teacher = jax.lax.stop_gradient(self._each(self.teacher, feeds))
        return student, teacher

    def _each(self, run: Callable[[Feeds], Feeds], feeds: Feeds) -> Feeds:
        """Run a model on a batch: as it is, or on each sample where its own batch is fixed."""
        if not self.train.fixed_batch:
            return run(feeds)
        made: Feeds = jax.vmap(run)(feeds)
        return {name: array.reshape(-1, *array.shape[2:]) for name, array in made.items()}

    def _labelled(self, batch: Feeds) -> Feeds:
        if not self.train.fixed_batch or LABELS not in batch:
            return batch
        labels = batch[LABELS]
        return {**batch, LABELS: labels.reshape(-1, *labels.shape[2:])}

    def _loss(self, parameters: Parameters, masks: Any, batch: Feeds) -> Any:
        student, teacher = self._outputs(parameters, masks, batch)
        return self.objective(student, teacher, self._labelled(batch))

    def _step(self, optimizer: Any) -> Callable[..., Any]:
        import optax

        def step(parameters: Parameters, memory: Any, masks: Any, batch: Feeds) -> Any:
            loss, gradient = jax.value_and_grad(self._loss)(parameters, masks, batch)
            updates, memory = optimizer.update(gradient, memory, parameters)
            parameters = optax.apply_updates(parameters, updates)
            norm = optax.global_norm(gradient)
            return parameters, memory, jnp.where(jnp.isfinite(norm), loss, norm)

        return step

    def _figures(self, parameters: Parameters, masks: Any, batch: Feeds) -> Any:
        student, teacher = self._outputs(parameters, masks, batch)
        batch = self._labelled(batch)
        loss = self.objective(student, teacher, batch)
        return loss, self.objective.score(student, teacher, batch)

    def _look(self, look: Any, state: _State, step: int, train_loss: float | None) -> Look:
        losses, scores, counts, plain = [], [], [], []
        for batch, changed in self._held_out():
            loss, score = look(state.parameters, state.masks, batch)
            losses.append(float(loss))
            scores.append(float(score))
            counts.append(len(next(iter(batch.values()))))
            plain.append(0 if changed else counts[-1])
        seen = Look(
            step,
            float(np.average(losses, weights=counts)),
            float(np.average(scores, weights=plain)),
            train_loss,
        )
        state.history.append(seen)
        sparse = not self.schedule.steps or step >= self.schedule.ends
        better = state.best_look is None or not state.best_look.loss <= seen.loss
        if sparse and better and math.isfinite(seen.loss):
            state.best_look, state.best_masks = seen, state.masks
            state.best = jax.tree.map(jnp.copy, state.parameters)
        return seen

    def _held_out(self) -> Iterator[tuple[Feeds, bool]]:
        """The held-out samples in batches, and whether they are changed: few of them are looked at
        so as well, alike at every look."""
        count = self.held_out.count
        size = min(self.settings.batch, count)
        rounds = -(-FEW // count) if self.settings.augment else 1
        for turn in range(rounds):
            for begin in range(0, count, size):
                batch = self.held_out.take(slice(begin, begin + size))
                rng = np.random.default_rng([self.settings.seed, 4, turn, begin])
                yield (self._changed(rng, batch) if turn else batch), turn > 0

    def _verdict(self, state: _State) -> tuple[str, str]:
        first, last = state.history[0], state.history[-1]
        limit = max(FAR * abs(first.loss), abs(first.loss) + 1)
        if not math.isfinite(last.loss) or (last.loss > limit and not self._rising(last.step)):
            return "diverged", (
                f"the held-out loss went from {first.loss:.4g} to {last.loss:.4g} "
                f"by update {last.step}"
            )
        patience = self.settings.patience
        if patience and state.best_look is not None:
            since = [look for look in state.history if look.step > state.best_look.step]
            if len(since) >= patience and last.step < self.updates:
                return "early", (
                    f"the held-out loss has not improved for {len(since)} evaluations, "
                    f"since update {state.best_look.step}"
                )
        return "finished", ""

    def _rising(self, step: int) -> bool:
        """Whether the sparsity still rises, and the loss with it."""
        return bool(self.schedule.steps) and step <= self.schedule.ends

    def _trees(self, state: _State) -> dict[str, Any]:
        return {
            "parameters": state.parameters,
            "optimizer": state.optimizer,
            "masks": state.masks,
            "best": state.best,
            "best_masks": state.best_masks,
        }

    def _save(self, state: _State, checkpoint: Checkpoint, step: int) -> None:
        history = [[look.step, look.loss, look.score, look.train_loss] for look in state.history]
        places = [index for index, one in enumerate(state.history) if one is state.best_look]
        facts = {"step": step, "history": history, "best": places[0] if places else None}
        checkpoint.save(self._trees(state), facts)

    def _resume(self, state: _State, checkpoint: Checkpoint | None) -> int:
        """Take up a state that was saved; return the update to go on with."""
        found = checkpoint.load(self._trees(state)) if checkpoint is not None else None
        if found is None:
            return 0
        trees, facts = found
        for name, tree in trees.items():
            setattr(state, name, tree)
        state.history = [Look(*row) for row in facts["history"]]
        if facts["best"] is not None:
            state.best_look = state.history[facts["best"]]
        return int(facts["step"])
