"""RNN, GRU and LSTM as scans over time, in both directions, with lengths and peepholes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from trivium.backends.xla.lowering.lazy import jax, jnp, lax
from trivium.backends.xla.lowering.registry import handles
from trivium.backends.xla.lowering.trace import Op

_ACTIVATIONS: dict[str, Callable[..., Any]] = {
    "relu": lambda x, a, b: jnp.maximum(x, 0),
    "tanh": lambda x, a, b: jnp.tanh(x),
    "sigmoid": lambda x, a, b: jax.nn.sigmoid(x),
    "affine": lambda x, a, b: a * x + b,
    "leakyrelu": lambda x, a, b: jnp.where(x < 0, a * x, x),
    "thresholdedrelu": lambda x, a, b: jnp.where(x > a, x, 0),
    "scaledtanh": lambda x, a, b: a * jnp.tanh(b * x),
    "hardsigmoid": lambda x, a, b: jnp.clip(a * x + b, 0, 1),
    "elu": lambda x, a, b: jnp.where(x < 0, a * jnp.expm1(x), x),
    "softsign": lambda x, a, b: x / (1 + jnp.abs(x)),
    "softplus": lambda x, a, b: jnp.logaddexp(x, 0),
}

_ALPHA = {"leakyrelu": 0.01, "thresholdedrelu": 1.0, "hardsigmoid": 0.2, "elu": 1.0}
_BETA = {"hardsigmoid": 0.5}

Activation = Callable[[Any], Any]
Step = Callable[..., tuple[Any, ...]]


def _activations(op: Op, defaults: list[str], directions: int) -> list[list[Activation]]:
    """The activation functions of each direction."""
    names = [name.lower() for name in op.attr("activations") or defaults * directions]
    alphas, betas = list(op.attr("activation_alpha", [])), list(op.attr("activation_beta", []))
    made: list[Activation] = []
    for name in names:
        # Values are given only for the functions that take them, in order.
        takes_a = name in (*_ALPHA, "affine", "scaledtanh")
        takes_b = name in (*_BETA, "affine", "scaledtanh")
        a = alphas.pop(0) if takes_a and alphas else _ALPHA.get(name, 1.0)
        b = betas.pop(0) if takes_b and betas else _BETA.get(name, 1.0)
        made.append(partial(_ACTIVATIONS[name], a=a, b=b))
    each = len(defaults)
    return [made[start : start + each] for start in range(0, len(made), each)]


def _clipped(op: Op, x: Any) -> Any:
    limit = op.attr("clip", 0.0)
    return jnp.clip(x, -limit, limit) if limit else x


def _run(
    op: Op, x: Any, lengths: Any, states: list[list[Any]],
    steps: list[Step],
) -> Any:  # fmt: skip
    """Run a step function for each direction; return Y and the final states, ONNX's shapes.

    Args:
        x: (time, batch, input).
        states: For each direction the initial states, (batch, hidden).
    """
    direction = op.attr("direction", "forward")
    outputs, finals = [], []
    for index, step in enumerate(steps):
        backward = direction == "reverse" or index == 1

        def advance(
            state: tuple[Any, ...], row: Any, step: Any = step
        ) -> tuple[tuple[Any, ...], Any]:
            time, value = row
            new = step(value, state)
            if lengths is not None:
                live = (time < lengths)[:, None]
                kept = tuple(jnp.where(live, n, o) for n, o in zip(new, state, strict=True))
                return kept, jnp.where(live, new[0], jnp.zeros((), x.dtype))
            return new, new[0]

        rows = (jnp.arange(x.shape[0]), x)
        final, y = lax.scan(advance, tuple(states[index]), rows, reverse=backward)
        outputs.append(y)
        finals.append(final)
    y = jnp.stack(outputs, axis=1)
    ends = [jnp.stack(parts) for parts in zip(*finals, strict=True)]
    if op.attr("layout", 0):
        return (jnp.transpose(y, (2, 0, 1, 3)), *(jnp.swapaxes(end, 0, 1) for end in ends))
    return (y, *ends)


class _Cell:
    """The operands that the three cells share, batch-second."""

    def __init__(
        self, op: Op, x: Any, w: Any, r: Any, b: Any, lengths: Any, states: list[Any], gates: int
    ) -> None:
        batch_first = op.attr("layout", 0)
        self.x = jnp.swapaxes(x, 0, 1) if batch_first else jnp.asarray(x)
        self.w, self.r = jnp.asarray(w), jnp.asarray(r)
        self.directions = w.shape[0]
        self.hidden = r.shape[2]
        shape = (self.directions, 2 * gates * self.hidden)
        self.b = jnp.zeros(shape, x.dtype) if b is None else jnp.asarray(b)
        self.lengths = None if lengths is None else jnp.asarray(lengths)
        zeros = jnp.zeros((self.x.shape[1], self.hidden), x.dtype)
        self.states = [
            [zeros if s is None else (s[:, d] if batch_first else s[d]) for s in states]
            for d in range(self.directions)
        ]


@handles("RNN")
def rnn(op: Op, x: Any, w: Any, r: Any, b: Any = None, lengths: Any = None, h: Any = None) -> Any:
    cell = _Cell(op, x, w, r, b, lengths, [h], 1)
    functions = _activations(op, ["tanh"], cell.directions)
    steps: list[Step] = []
    for d in range(cell.directions):
        bias = cell.b[d, : cell.hidden] + cell.b[d, cell.hidden :]

        def step(value: Any, state: Any, d: int = d, bias: Any = bias) -> tuple[Any, ...]:
            total = value @ cell.w[d].T + state[0] @ cell.r[d].T + bias
            return (functions[d][0](_clipped(op, total)),)

        steps.append(step)
    return _run(op, cell.x, cell.lengths, cell.states, steps)


@handles("GRU")
def gru(op: Op, x: Any, w: Any, r: Any, b: Any = None, lengths: Any = None, h: Any = None) -> Any:
    cell = _Cell(op, x, w, r, b, lengths, [h], 3)
    functions = _activations(op, ["sigmoid", "tanh"], cell.directions)
    size = cell.hidden
    reset_after = bool(op.attr("linear_before_reset", 0))
    steps: list[Step] = []
    for d in range(cell.directions):

        def step(value: Any, state: Any, d: int = d) -> tuple[Any, ...]:
            (h,) = state
            wb, rb = cell.b[d, : 3 * size], cell.b[d, 3 * size :]
            into = value @ cell.w[d].T + wb
            gates = h @ cell.r[d, : 2 * size].T + rb[: 2 * size]
            f, g = functions[d]
            z = f(_clipped(op, into[:, :size] + gates[:, :size]))
            reset = f(_clipped(op, into[:, size : 2 * size] + gates[:, size:]))
            rh, rbh = cell.r[d, 2 * size :], rb[2 * size :]
            past = reset * (h @ rh.T + rbh) if reset_after else (reset * h) @ rh.T + rbh
            new = g(_clipped(op, into[:, 2 * size :] + past))
            return ((1 - z) * new + z * h,)

        steps.append(step)
    return _run(op, cell.x, cell.lengths, cell.states, steps)


@handles("LSTM")
def lstm(
    op: Op, x: Any, w: Any, r: Any, b: Any = None, lengths: Any = None, h: Any = None,
    c: Any = None, p: Any = None,
) -> Any:  # fmt: skip
    cell = _Cell(op, x, w, r, b, lengths, [h, c], 4)
    functions = _activations(op, ["sigmoid", "tanh", "tanh"], cell.directions)
    size = cell.hidden
    coupled = bool(op.attr("input_forget", 0))
    peep = jnp.zeros((cell.directions, 3 * size), x.dtype) if p is None else jnp.asarray(p)
    steps: list[Step] = []
    for d in range(cell.directions):
        bias = cell.b[d, : 4 * size] + cell.b[d, 4 * size :]

        def step(value: Any, state: Any, d: int = d, bias: Any = bias) -> tuple[Any, ...]:
            h, c = state
            total = value @ cell.w[d].T + h @ cell.r[d].T + bias
            i, o, f, g = jnp.split(total, 4, axis=-1)
            peep_i, peep_o, peep_f = jnp.split(peep[d], 3)
            gate, squash, emit = functions[d]
            i = gate(_clipped(op, i + peep_i * c))
            f = 1 - i if coupled else gate(_clipped(op, f + peep_f * c))
            new = f * c + i * squash(_clipped(op, g))
            o = gate(_clipped(op, o + peep_o * new))
            return o * emit(new), new

        steps.append(step)
    return _run(op, cell.x, cell.lengths, cell.states, steps)
