"""optax's optimizers and schedules by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trivium.backends.xla.lowering.lazy import jnp
from trivium.backends.xla.training.settings import Settings
from trivium.compiler.errors import ToolchainMissing

DECAY = 0.01
"""How much an exponential schedule has left at its end; weight decay of adamw is optax's own."""


def require() -> None:
    """Raise ``ToolchainMissing`` unless jax and optax are there."""
    from importlib.util import find_spec

    for package in ("jax", "optax"):
        if find_spec(package) is None:
            raise ToolchainMissing(
                f"{package} is not installed",
                about="tune",
                remedy="pip install 'trivium[tune]'",
            )


def make(settings: Settings, updates: int) -> Any:
    """The optimizer of a training, with gradients cut to a norm and the rate's schedule."""
    import optax

    build = getattr(optax, settings.optimizer)
    options: dict[str, Any] = {"momentum": 0.9} if settings.optimizer == "sgd" else {}
    made = build(_single(schedule(settings, updates)), **options)
    if not settings.clip:
        return made
    return optax.chain(optax.clip_by_global_norm(settings.clip), made)


def schedule(settings: Settings, updates: int) -> Callable[[Any], Any]:
    """The learning rate by update."""
    import optax

    rate, name = settings.rate, settings.schedule
    rise = int(settings.warmup * updates)
    rest = max(1, updates - rise)
    if name == "onecycle":
        cycle: Callable[[Any], Any] = optax.cosine_onecycle_schedule(max(2, updates), rate)
        return cycle
    after = {
        "constant": optax.constant_schedule(rate),
        "cosine": optax.cosine_decay_schedule(rate, rest, alpha=0.01),
        "linear": optax.linear_schedule(rate, 0.0, rest),
        "exponential": optax.exponential_decay(rate, rest, DECAY),
    }[name]
    if not rise:
        return after  # type: ignore[no-any-return]
    warm = optax.linear_schedule(rate / rise, rate, rise)
    joined: Callable[[Any], Any] = optax.join_schedules([warm, after], [rise])
    return joined


def _single(rate: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The rate in float32: with 64-bit types on, optax would make float64 of it and the weights."""
    return lambda count: jnp.asarray(rate(count), "float32")
