"""Choosing tokens: what may be drawn, how often, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trivium.compiler.errors import BadInput
from trivium.compiler.generation.sampling import Settings, choose, log_probs
from trivium.compiler.generation.speculation import MOST, PromptLookup

LOGITS = np.log(np.array([0.5, 0.25, 0.15, 0.1], np.float32))


def drawn(settings: Settings, count: int = 4000) -> np.ndarray[Any, Any]:
    tokens = [choose(LOGITS, settings, position) for position in range(count)]
    return np.bincount(tokens, minlength=4) / count


def test_frequencies_are_the_probabilities() -> None:
    np.testing.assert_allclose(drawn(Settings(temperature=1)), np.exp(LOGITS), atol=0.03)
    squared = np.exp(LOGITS) ** 2
    cold = drawn(Settings(temperature=0.5, seed=1))
    np.testing.assert_allclose(cold, squared / squared.sum(), atol=0.03)


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"top_k": 2}, [0, 1]),
        ({"top_p": 0.5}, [0]),
        ({"top_p": 0.6}, [0, 1]),
        ({"top_p": 0.95}, [0, 1, 2, 3]),
        ({"top_k": 3, "top_p": 0.8}, [0, 1]),
        ({"top_k": 99}, [0, 1, 2, 3]),
    ],
)
def test_what_is_left_out_is_never_drawn(options: dict[str, Any], allowed: list[int]) -> None:
    found = drawn(Settings(temperature=1, **options))
    assert list(np.flatnonzero(found)) == allowed


def test_seed_and_position_decide() -> None:
    one, other = Settings(temperature=1, seed=1), Settings(temperature=1, seed=2)
    first = [choose(LOGITS, one, position) for position in range(50)]
    assert first == [choose(LOGITS, one, position) for position in range(50)]
    assert first != [choose(LOGITS, other, position) for position in range(50)]


def test_log_probabilities_are_of_the_whole_vocabulary() -> None:
    report = log_probs(LOGITS + 7, 2, 2)
    assert report.logprob == pytest.approx(np.log(0.15), abs=1e-6)
    assert [token for token, _ in report.top] == [0, 1]


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0}, {"temperature": -0.1}, {"temperature": float("nan")}, {"top_p": 0},
        {"top_p": 1.1}, {"top_k": -1}, {"seed": -1}, {"stop": ("",)}, {"logprobs": 21},
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=next(iter(options))):
        Settings(**options)


def test_look_up_guesses_what_followed_before() -> None:
    lookup = PromptLookup()
    lookup.extend([1, 2, 3, 4, 5, 6, 1, 2, 3])
    assert lookup.guess(8) == [4, 5]
    assert lookup.guess(1) == [4]
    lookup.extend([9])
    assert lookup.guess(8) == []


@given(outcomes=st.lists(st.booleans(), max_size=60))
def test_guesses_adapt_to_what_comes_true(outcomes: list[bool]) -> None:
    lookup = PromptLookup()
    lookup.extend([1, 2] * 20)
    for good in outcomes:
        guess = lookup.guess(99)
        assert len(guess) <= MOST
        lookup.learn(len(guess), len(guess) if good else 0)
        lookup.extend([1, 2])
    if outcomes[-6:] == [False] * 6:
        assert len(lookup.guess(99)) <= 1


def test_what_costs_nothing_to_check_is_what_followed_the_last_token() -> None:
    lookup = PromptLookup()
    lookup.extend([1, 2, 3, 4, 5, 6, 2])
    assert lookup.guess(8) == []
    assert lookup.likely([]) == 3
    assert lookup.likely([3, 4]) == 5
    lookup.extend([7])
    assert lookup.likely([]) == 7
    assert PromptLookup().likely([9]) == 9
