"""The options of a tuning, checked once: the command line's flags and `trivium.tune`'s keywords."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trivium.compiler.errors import BadInput

OPTIMIZERS = (
    "adam", "adamw", "adagrad", "adamax", "lamb", "lion", "nadam", "radam", "rmsprop", "sgd",
)  # fmt: skip
SCHEDULES = ("constant", "cosine", "linear", "exponential", "onecycle")
LOSSES = ("cross-entropy", "next-token", "mse", "mae", "cosine", "binary-cross-entropy")
MATCHES = ("auto", "kl", "mse", "cosine")

Loss = Callable[[dict[str, Any], dict[str, Any]], Any]
"""A loss of the user's: outputs and batch, both by name, to a scalar."""

Augment = Callable[[Any, dict[str, Any]], dict[str, Any]]
"""Changes a batch of inputs at random: a numpy generator and arrays by name, to arrays by name."""


@dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes:
        steps: Updates; 0 for as many as ``epochs`` asks for.
        epochs: Passes over the data where ``steps`` is 0.
        batch: Samples (windows of tokens) in one update.
        rate: Peak learning rate.
        optimizer, schedule: By optax's names.
        warmup: Share of the steps over which the rate rises.
        clip: Global norm that gradients are cut to; 0 leaves them.
        loss: A name of `LOSSES` or a function; None without labels.
        alpha: Weight of the task's loss beside distillation.
        temperature: Of the softened probabilities.
        match: How outputs are compared with the teacher's; auto looks at what computes them.
        hidden, attention: Values, and Attention or Softmax nodes, to match as well: ``NAME`` or
            ``NAME=TEACHER'S NAME``.
        hidden_weight, attention_weight: Of those in the loss.
        augment: Names of `trivium.backends.xla.training.augment`, or a function.
        freeze: Names of weights to leave as they are; ``*`` and ``?`` as in a shell.
        scales: Whether the scales of quantized weights are trained with them.
        refit: Whether products are fitted to the teacher's values by least squares before the first
            update: see `trivium.passes.coupling.teach`.
        gradual: Share of the steps over which a pruning recipe reaches its sparsity.
        validation: Share of the samples held out.
        evaluations: How often the held-out samples are looked at.
        patience: Evaluations without improvement after which to stop; 0 never stops.
        window: Tokens of one sample, for text.
    """

    steps: int = 0
    epochs: float = 10.0
    batch: int = 32
    rate: float = 1e-4
    optimizer: str = "adamw"
    schedule: str = "cosine"
    warmup: float = 0.05
    clip: float = 1.0
    loss: str | Loss | None = None
    alpha: float = 0.3
    temperature: float = 2.0
    match: str = "auto"
    hidden: tuple[str, ...] = ()
    attention: tuple[str, ...] = ()
    hidden_weight: float = 1.0
    attention_weight: float = 1.0
    augment: tuple[str, ...] | Augment = ()
    freeze: tuple[str, ...] = ()
    scales: bool = True
    refit: bool = False
    gradual: float = 0.0
    validation: float = 0.1
    evaluations: int = 20
    patience: int = 5
    window: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        _choose("optimizer", self.optimizer, OPTIMIZERS)
        _choose("schedule", self.schedule, SCHEDULES)
        _choose("match", self.match, MATCHES)
        if isinstance(self.loss, str):
            _choose("loss", self.loss, LOSSES)
        for name in ("alpha", "warmup", "gradual"):
            _within(name, getattr(self, name), 0.0, 1.0)
        _within("validation", self.validation, 0.0, 0.9)
        for name in ("rate", "temperature", "epochs"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise BadInput(f"{value} is not a finite number above 0", about=f"--{name}")
        for name in ("batch", "evaluations", "window"):
            if getattr(self, name) < 1:
                raise BadInput(f"{getattr(self, name)} is not at least 1", about=f"--{name}")
        for name in ("steps", "patience", "clip", "hidden_weight", "attention_weight"):
            if getattr(self, name) < 0:
                flag = name.replace("_", "-")
                raise BadInput(f"{getattr(self, name)} is below 0", about=f"--{flag}")


def _choose(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise BadInput(
            f"{value!r} is not known", about=f"--{name}", remedy=f"known: {', '.join(known)}"
        )


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise BadInput(f"{value} is not between {low:g} and {high:g}", about=f"--{name}")
