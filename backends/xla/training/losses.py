"""What is minimized: a task's loss on labels, and distance from a teacher.

``L = alpha * task + (1 - alpha) * T^2 * KL(teacher || student)`` on logits (Hinton et al., 2015);
outputs that are no logits are matched by their error relative to the teacher's power, and so are
hidden states and attention maps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from trivium.backends.xla.lowering.lazy import jax, jnp
from trivium.backends.xla.training.data import LABELS
from trivium.backends.xla.training.settings import Loss, Settings
from trivium.compiler.errors import BadInput
from trivium.compiler.passing import producer

Values = Mapping[str, Any]

HIDDEN, ATTENTION = "trivium.hidden.", "trivium.attention."
"""What the names of tapped values begin with."""


def cross_entropy(scores: Any, labels: Any) -> Any:
    """Of logits ``[..., classes]`` and classes, or one-hot rows."""
    if labels.ndim == scores.ndim and labels.shape[-1] == scores.shape[-1] > 1:
        labels = jnp.argmax(labels, axis=-1)
    logs = jax.nn.log_softmax(scores, axis=-1)
    flat = logs.reshape(-1, logs.shape[-1])
    chosen = labels.reshape(-1).astype("int32")
    return -jnp.take_along_axis(flat, chosen[:, None], axis=-1).mean()


def binary_cross_entropy(scores: Any, labels: Any) -> Any:
    """Of logits and labels between 0 and 1."""
    labels = labels.reshape(scores.shape).astype(scores.dtype)
    return (jax.nn.softplus(scores) - labels * scores).mean()


def squared(have: Any, want: Any) -> Any:
    return jnp.mean((have - want.reshape(have.shape).astype(have.dtype)) ** 2)


def absolute(have: Any, want: Any) -> Any:
    return jnp.mean(jnp.abs(have - want.reshape(have.shape).astype(have.dtype)))


def cosine_distance(have: Any, want: Any) -> Any:
    """One minus the cosine between rows (the last axis)."""
    want = want.reshape(have.shape).astype(have.dtype)
    return jnp.mean(1 - cosine(have, want))


def cosine(a: Any, b: Any) -> Any:
    tiny = jnp.asarray(1e-12, a.dtype)
    norms = jnp.sqrt((a * a).sum(-1) * (b * b).sum(-1) + tiny)
    return (a * b).sum(-1) / norms


_TASKS: dict[str, Callable[[Any, Any], Any]] = {
    "cross-entropy": cross_entropy,
    "next-token": cross_entropy,
    "binary-cross-entropy": binary_cross_entropy,
    "mse": squared,
    "mae": absolute,
    "cosine": cosine_distance,
}


def divergence(student: Any, teacher: Any, temperature: float) -> Any:
    """``T^2 * KL(teacher || student)`` of logits softened by T."""
    soft = jax.nn.log_softmax(student / temperature, axis=-1)
    goal = jax.nn.log_softmax(teacher / temperature, axis=-1)
    return temperature**2 * jnp.mean(jnp.sum(jnp.exp(goal) * (goal - soft), axis=-1))


def relative(student: Any, teacher: Any) -> Any:
    """Mean squared error in units of the teacher's power."""
    power = jnp.mean(teacher**2) + jnp.asarray(1e-12, teacher.dtype)
    return jnp.mean((student - teacher) ** 2) / power


def _angle(student: Any, teacher: Any) -> Any:
    return jnp.mean(1 - cosine(student, teacher))


@dataclass(frozen=True)
class Objective:
    """The whole of what is minimized.

    Attributes:
        outputs: The graph's float outputs, the first one being what labels are compared with.
        kinds: How each is matched with the teacher's: kl, mse or cosine.
        task: The loss on labels, or None.
        distill: Whether there is a teacher.
    """

    settings: Settings
    outputs: tuple[str, ...]
    kinds: Mapping[str, str]
    task: str | Loss | None
    distill: bool

    def __call__(self, student: Values, teacher: Values, batch: Values) -> Any:
        """The loss of a batch."""
        alpha = self.settings.alpha if self.task is not None and self.distill else 1.0
        total: Any = jnp.zeros((), "float32")
        if self.task is not None:
            total = total + alpha * self._task(student, batch)
        if self.distill:
            share = 1.0 if self.task is None else 1.0 - alpha
            matched = [self._match(name, student, teacher) for name in self.outputs]
            total = total + share * sum(matched) / len(matched)
            total = total + self._tapped(student, teacher)
        return total.astype("float32")

    def _task(self, student: Values, batch: Values) -> Any:
        if callable(self.task):
            return self.task(dict(student), dict(batch))
        return _TASKS[str(self.task)](student[self.outputs[0]], batch[LABELS])

    def _match(self, name: str, student: Values, teacher: Values) -> Any:
        kind = self.kinds[name]
        if kind == "kl":
            return divergence(student[name], teacher[name], self.settings.temperature)
        return (_angle if kind == "cosine" else relative)(student[name], teacher[name])

    def _tapped(self, student: Values, teacher: Values) -> Any:
        total: Any = jnp.zeros((), "float32")
        for name, value in student.items():
            if name.startswith(HIDDEN):
                _same(name, value, teacher[name], "--hidden")
                total = total + self.settings.hidden_weight * relative(value, teacher[name])
            elif name.startswith(ATTENTION):
                goal = teacher[name]
                if value.shape != goal.shape and value.ndim == goal.ndim == 4:
                    # Heads were pruned: what is left is compared with the mean over all.
                    value, goal = value.mean(axis=1), goal.mean(axis=1)
                _same(name, value, goal, "--attention")
                total = total + self.settings.attention_weight * relative(value, goal)
        return total

    @property
    def measure(self) -> str:
        """What is reported beside the loss."""
        if self.task in ("cross-entropy", "next-token", "binary-cross-entropy"):
            return "accuracy"
        if self.distill:
            return "agreement" if self.kinds[self.outputs[0]] == "kl" else "cosine"
        return ""

    def score(self, student: Values, teacher: Values, batch: Values) -> Any:
        """The measure on a batch, 0 to 1; NaN where there is none."""
        have = student[self.outputs[0]]
        if self.measure == "accuracy":
            labels = batch[LABELS]
            if self.task == "binary-cross-entropy":
                return jnp.mean((have > 0) == (labels.reshape(have.shape) > 0.5))
            if labels.ndim == have.ndim and labels.shape[-1] == have.shape[-1] > 1:
                labels = jnp.argmax(labels, axis=-1)
            return jnp.mean(jnp.argmax(have, -1).reshape(-1) == labels.reshape(-1))
        if self.measure == "agreement":
            return jnp.mean(jnp.argmax(have, -1) == jnp.argmax(teacher[self.outputs[0]], -1))
        if self.measure == "cosine":
            return jnp.mean(cosine(have, teacher[self.outputs[0]]))
        return jnp.asarray(float("nan"), "float32")


def _same(name: str, student: Any, teacher: Any, flag: str) -> None:
    if student.shape != teacher.shape:
        raise BadInput(
            f"{name.rpartition('.')[2]!r} is {list(student.shape)} in the model and "
            f"{list(teacher.shape)} in its teacher",
            about=flag,
            remedy="match values that pruning left as wide as they were",
        )


def objective(
    settings: Settings, model: ir.Model, *, labelled: bool, tokens: bool, distill: bool
) -> Objective:
    """Choose the parts of the loss.

    Raises:
        BadInput: Nothing to minimize, or a loss that needs what is not there.
    """
    outputs = tuple(
        value.name or ""
        for value in model.graph.outputs
        if (value.dtype is None or value.dtype.is_floating_point())
        and not (value.name or "").startswith((HIDDEN, ATTENTION))
    )
    if not outputs:
        raise BadInput("the model has no float output to train", about=model.graph.name or "model")
    values = {value.name: value for value in model.graph.outputs}
    kinds = {}
    for name in outputs:
        logits = tokens or is_logits(values[name])
        kinds[name] = settings.match if settings.match != "auto" else "kl" if logits else "mse"
    task = settings.loss
    if task is None and labelled:
        task = "next-token" if tokens else "cross-entropy" if kinds[outputs[0]] == "kl" else "mse"
    if isinstance(task, str) and not labelled:
        raise BadInput(
            f"the loss {task} needs labels",
            about="--loss",
            remedy=f"put an array {LABELS!r} into the data, or distill without a loss",
        )
    if task is None and not distill:
        raise BadInput(
            "there is nothing to learn from: no labels and no teacher",
            about="--recipe",
            remedy=f"add +distill to the recipe, or an array {LABELS!r} to the data",
        )
    return Objective(settings, outputs, kinds, task, distill)


def is_logits(value: ir.Value) -> bool:
    """Whether a value is made by a product (and its bias), as logits are."""
    for _ in range(8):
        maker = value.producer()
        if maker is None or maker.domain:
            return False
        if maker.op_type in ("Gemm", "MatMul", "Conv", "LogSoftmax"):
            return True
        if maker.op_type not in _PASSED or maker.inputs[0] is None:
            return False
        value = maker.inputs[0]
        if maker.op_type == "Add" and producer(value, "MatMul", "Gemm") is None:
            other = maker.inputs[1]
            value = other if other is not None and other.producer() is not None else value
    return False


_PASSED = frozenset(
    {"Add", "Cast", "DequantizeLinear", "Flatten", "GlobalAveragePool", "Identity",
     "QuantizeLinear", "Reshape", "Squeeze"}
)  # fmt: skip
