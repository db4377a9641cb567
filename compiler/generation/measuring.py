"""How fast a decoder reads and continues."""

from __future__ import annotations

import time
from typing import Any

from trivium.compiler.generator import STEP_TOKENS, Decoder
from trivium.compiler.timing import Timing, summarize


def time_decoder(
    decoder: Decoder[Any], *, budget_s: float, most: int
) -> tuple[int, Timing, Timing]:
    """Time prefill and decode of one text of up to `STEP_TOKENS` tokens.

    Args:
        budget_s: Seconds for all of it; a third is spent on prefill.
        most: Calls of each, at most.

    Returns:
        How many tokens the text has; reading it but for its last token; that token's step.
    """
    length = min(decoder.generator.context, STEP_TOKENS)
    prompt = [1] * (length - 1)

    def read() -> Any:
        cache = decoder.start(capacity=length)
        decoder.feed(cache, [prompt])
        return cache

    cache = read()
    reading: list[float] = []
    while not reading or (sum(reading) < budget_s / 3 and len(reading) < most):
        began = time.perf_counter()
        read()
        reading.append(time.perf_counter() - began)
    steps: list[float] = []
    started = time.perf_counter()
    while len(steps) < 5 or (
        time.perf_counter() - started < budget_s * 2 / 3 and len(steps) < most
    ):
        began = time.perf_counter()
        decoder.feed(cache, [[1]])
        steps.append(time.perf_counter() - began)
        decoder.truncate(cache, [length - 1])
    return length, summarize(reading), summarize(steps[1:])
