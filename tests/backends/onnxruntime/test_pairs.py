"""What is guessed changes no digit of a logit, also where activations are rounded to int8."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import trivium
from trivium.compiler.artifact import Artifact
from trivium.compiler.generation.sampling import Settings
from trivium.compiler.generation.text import Completion, TextGenerator

ASKED = Settings(max_new_tokens=60, logprobs=0)
PROMPTS = ([8, 51, 6, 37, 29, 41, 17, 12] * 6, [8, 51, 6, 37, 29] * 7, [41, 458, 305])


@pytest.fixture(scope="module")
def artifact(
    shared_data: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Artifact:
    out = tmp_path_factory.mktemp("pairs") / "artifact"
    return trivium.compile(shared_data("llm-shakespeare"), "cpu", recipe="int4", out=out)


def values(one: Completion) -> list[float]:
    return [each.logprob for each in one.logprobs]


def test_guesses_change_no_digit(artifact: Artifact) -> None:
    plain = TextGenerator(artifact, rows=1, speculate=False, prefix_bytes=0)
    guessing = TextGenerator(artifact, rows=1, prefix_bytes=0)
    for prompt in PROMPTS:
        (want,), (have,) = (one.complete([prompt], ASKED) for one in (plain, guessing))
        assert have.tokens == want.tokens
        np.testing.assert_allclose(values(have), values(want), rtol=0, atol=1e-5)
    assert plain.engine.counts.guessed == 0
    assert guessing.engine.counts.accepted > 5


def test_what_was_read_before_changes_no_digit(artifact: Artifact) -> None:
    reading = TextGenerator(artifact, rows=1, prefix_bytes=0)
    knowing = TextGenerator(artifact, rows=1)
    knowing.complete([PROMPTS[0][:31]], ASKED)
    (want,), (have,) = (one.complete([PROMPTS[0]], ASKED) for one in (reading, knowing))
    assert knowing.engine.counts.reused > 20
    assert have.tokens == want.tokens
    np.testing.assert_allclose(values(have), values(want), rtol=0, atol=1e-5)


def test_a_text_ends_where_its_room_does(artifact: Artifact) -> None:
    generator = TextGenerator(artifact, rows=1, capacity=20)
    (one,) = generator.complete([[5, 6, 7] * 5], Settings(max_new_tokens=50))
    assert len(one.tokens) == 5
    assert one.finish_reason == "length"


def widths(artifact: Artifact, *, exact: bool) -> list[int]:
    """How many tokens each call is given."""
    generator = TextGenerator(artifact, rows=1, speculate=False, prefix_bytes=0, exact=exact)
    feed, found = generator.decoder.feed, []

    def counted(cache: object, tokens: list[list[int]], keep: int = 1) -> object:
        found.append(len(tokens[0]))
        return feed(cache, tokens, keep)

    generator.decoder.feed = counted  # type: ignore[method-assign, assignment]
    generator.complete([[3, 1, 4]], Settings(max_new_tokens=4))
    return found


def test_pairs_are_for_rounded_activations_and_can_be_done_without(
    artifact: Artifact, shared_data: Callable[[str], Path], tmp_path: Path
) -> None:
    wide = trivium.compile(shared_data("llm-shakespeare"), "cpu", out=tmp_path / "wide")
    assert widths(wide, exact=True) == [3, 1, 1, 1]
    assert widths(artifact, exact=False) == [3, 1, 1, 1]
    assert {width % 2 for width in widths(artifact, exact=True)} == {0}
