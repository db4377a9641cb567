"""What to generate, and how the next token is chosen from logits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trivium.compiler.errors import BadInput

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

MOST_LOGPROBS = 20


@dataclass(frozen=True)
class Settings:
    """How one text is continued.

    Attributes:
        temperature: 0 takes the likeliest token (greedy); otherwise logits are divided by it.
        top_p: Draw from the fewest likeliest tokens that have this probability together.
        top_k: Draw from so many of the likeliest tokens; 0 for all.
        seed: The same seed gives the same tokens, however they are batched or speculated on.
        stop: Texts that end the output, and are not part of it.
        logprobs: How many of the likeliest tokens to report for each one; None reports nothing,
            0 only the chosen one.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        def require(holds: bool, name: str, value: object, remedy: str) -> None:
            if not holds:
                raise BadInput(f"{name} is {value}", about="generate", remedy=remedy)

        require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "give 1 or more")
        finite = math.isfinite(self.temperature) and self.temperature >= 0
        require(finite, "temperature", self.temperature, "give 0 (greedy) or a number above")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "give a number above 0, at most 1")
        require(self.top_k >= 0, "top_k", self.top_k, "give 0 (all) or more")
        require(self.seed >= 0, "seed", self.seed, "give 0 or more")
        require(all(self.stop), "stop", '""', "give texts that are not empty")
        most = f"give 0 to {MOST_LOGPROBS}"
        asked = self.logprobs if self.logprobs is not None else 0
        require(0 <= asked <= MOST_LOGPROBS, "logprobs", self.logprobs, most)


@dataclass(frozen=True)
class LogProbs:
    """The natural logarithm of the chosen token's probability (at temperature 1, before anything
    was left out), and of the likeliest ones'."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def choose(logits: Array, settings: Settings, position: int) -> int:
    """Choose the token after ``position`` others.

    What is drawn depends on the seed and the position alone, so a token that was guessed ahead can
    be held against the one that would have been drawn.
    """
    import numpy as np

    if settings.temperature == 0:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) / settings.temperature
    count = min(settings.top_k or scaled.size, scaled.size)
    if count < scaled.size:
        likeliest = np.argpartition(-scaled, count - 1)[:count]
    else:
        likeliest = np.arange(scaled.size)
    likeliest = likeliest[np.argsort(-scaled[likeliest], kind="stable")]
    chances = np.exp(scaled[likeliest] - scaled[likeliest[0]])
    reached = np.cumsum(chances)
    reached /= reached[-1]
    if settings.top_p < 1:
        inside = int(np.searchsorted(reached, settings.top_p)) + 1
        reached = reached[:inside] / reached[:inside][-1]
    drawn = np.random.default_rng([settings.seed, position]).random()
    place = min(int(np.searchsorted(reached, drawn, side="right")), reached.size - 1)
    return int(likeliest[place])


def log_probs(logits: Array, token: int, count: int) -> LogProbs:
    """Report on a chosen token."""
    import numpy as np

    shifted = logits.astype(np.float64) - logits.max()
    normalized = shifted - np.log(np.exp(shifted).sum())
    top = np.argsort(-normalized, kind="stable")[:count]
    return LogProbs(
        token, float(normalized[token]), tuple((int(t), float(normalized[t])) for t in top)
    )
