"""The generation loop: whoever shares a call, whatever is guessed or reused, the tokens stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import trivium
from tests.generation.conftest import VOCAB
from tests.generation.oracle import Oracle
from trivium.compiler import model as models
from trivium.compiler.artifact import Artifact
from trivium.compiler.errors import BackendFailed, BadInput
from trivium.compiler.generation.engine import Engine, Piece
from trivium.compiler.generation.sampling import Settings
from trivium.compiler.generation.text import TextGenerator
from trivium.passes.insert_kv_cache import InsertKVCache

PROMPTS = ["ROMEO:\nI", "JULIET:\nO", "KING HENRY:", "First Citizen:\nBefore we", "A", "DUKE"]


@pytest.fixture(scope="module")
def small(small_decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Oracle, Any]:
    out = tmp_path_factory.mktemp("engine") / "artifact"
    artifact = trivium.compile(small_decoder, "cpu", out=out, generator=True)
    return Oracle(small_decoder), artifact.load().generator()  # type: ignore[attr-defined]


@settings(max_examples=6, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=2, max_size=5),
    arrivals=st.lists(st.integers(0, 3), min_size=5, max_size=5),
    rows=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_requests_that_come_and_go_get_the_source_s_greedy_tokens(
    small: tuple[Oracle, Any], lengths: list[int], arrivals: list[int], rows: int, seed: int
) -> None:
    oracle, decoder = small
    rng = np.random.default_rng(seed)
    engine = Engine(decoder, None, rows=rows, prefix_bytes=1 << 20)
    pending = [
        (wait, [int(t) for t in rng.integers(0, VOCAB, n)], int(rng.integers(1, 12)))
        for wait, n in zip(arrivals, lengths, strict=False)
    ]
    requests = []
    while pending or engine.busy:
        if pending and (pending[0][0] == 0 or not engine.busy):
            _, prompt, count = pending.pop(0)
            requests.append(engine.submit(prompt, Settings(max_new_tokens=count)))
            continue
        pending = [(max(0, wait - 1), *rest) for wait, *rest in pending]  # type: ignore[misc]
        engine.step()
    for request in requests:
        assert len(request.generated) == request.settings.max_new_tokens
        logits = oracle(request.tokens)
        for place, token in enumerate(request.generated, request.prompt):
            # The likeliest, or as likely to the last digits.
            assert logits[place - 1, token] >= logits[place - 1].max() - 1e-4


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_company_speculation_and_prefixes_change_no_token(
    shakespeare: Artifact, temperature: float
) -> None:
    asked = Settings(max_new_tokens=16, temperature=temperature, top_p=0.95, seed=5)
    plain = TextGenerator(shakespeare, rows=1, speculate=False, prefix_bytes=0)
    expected = [one.tokens for one in plain.complete(PROMPTS, asked)]
    for options in ({"rows": 4}, {"rows": 1, "prefix_bytes": 1 << 16}):
        generator = TextGenerator(shakespeare, **options)  # type: ignore[arg-type]
        for _ in range(2):
            assert [one.tokens for one in generator.complete(PROMPTS, asked)] == expected
    assert plain.engine.counts.guessed == 0


def test_speculation_saves_steps_on_text_that_repeats(shakespeare: Artifact) -> None:
    prompt = "KING RICHARD III:\nI'll not, my lord.\n\nKING RICHARD III:\n"
    asked = Settings(max_new_tokens=100)
    runs = {}
    for speculate in (False, True):
        generator = TextGenerator(shakespeare, rows=1, speculate=speculate)
        runs[speculate] = (generator.complete([prompt], asked)[0].tokens, generator.engine.counts)
    assert runs[True][0] == runs[False][0]
    assert runs[True][1].steps < 0.7 * runs[False][1].steps
    assert runs[True][1].accepted > 20


def test_texts_that_share_calls_are_guessed_ahead_together(
    any_decoder: Path, tmp_path: Path
) -> None:
    # Caches that the engine writes in place take one token of several rows at a time: the source
    # has caches of its own here, and they stay as they are.
    model = models.load(any_decoder)
    InsertKVCache(outputs="all")(model)
    path = tmp_path / "cached.onnx"
    models.save(model, path)
    artifact = trivium.compile(path, "cpu", out=tmp_path / "out", use_cache=False)
    decoder = artifact.load().generator()  # type: ignore[attr-defined]
    prompts = [[3, 1, 4, 1, 5] * 3, [7, 8] * 4, [9, 2, 6, 9, 2, 6, 9]]
    tokens, steps = {}, {}
    for speculate in (False, True):
        engine = Engine(decoder, None, rows=3, speculate=speculate)
        asked = [Settings(max_new_tokens=count) for count in (24, 30, 27)]
        requests = [engine.submit(p, own) for p, own in zip(prompts, asked, strict=True)]
        while engine.busy:
            engine.step()
        tokens[speculate] = [request.tokens for request in requests]
        steps[speculate] = engine.counts.steps
    assert tokens[True] == tokens[False]
    assert engine.counts.accepted > 0
    assert steps[True] <= steps[False]


def test_prompts_that_begin_alike_are_read_once(shakespeare: Artifact) -> None:
    generator = TextGenerator(shakespeare, rows=2)
    speech = (
        "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n"
    )
    asked = Settings(max_new_tokens=5)
    first = generator.complete([speech + "ROMEO:"], asked)
    assert generator.engine.counts.reused == 0
    second = generator.complete([speech + "JULIET:", speech + "ROMEO:"], asked)
    assert generator.engine.counts.reused > 50
    assert second[1].tokens == first[0].tokens


def test_log_probabilities_are_the_source_s(small: tuple[Oracle, Any]) -> None:
    oracle, decoder = small
    engine = Engine(decoder, None)
    request = engine.submit([3, 1, 4, 1, 5], Settings(max_new_tokens=6, logprobs=3))
    pieces: list[Piece] = []
    while engine.busy:
        pieces += engine.step()
    reports = [report for piece in pieces for report in piece.logprobs]
    logits = oracle(request.tokens).astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    for place, report in enumerate(reports, request.prompt):
        row = expected[place - 1]
        assert report.logprob == pytest.approx(row[report.token], abs=1e-3)
        assert [t for t, _ in report.top] == list(np.argsort(-row, kind="stable")[:3])
    assert len(reports) == 6


def test_cancelled_requests_leave(small: tuple[Oracle, Any]) -> None:
    engine = Engine(small[1], None, rows=2)
    requests = [engine.submit([n + 1], Settings(max_new_tokens=50)) for n in range(3)]
    engine.step()
    requests[0].cancelled = requests[2].cancelled = True
    pieces = engine.step()
    ended = {piece.index: piece.finish_reason for piece in pieces if piece.finish_reason}
    assert ended == {0: "cancelled", 2: "cancelled"}
    while engine.busy:
        engine.step()
    assert len(requests[1].generated) == 50
    assert (engine.active, engine.waiting) == (0, 0)


def test_text_ends_at_the_end_of_the_context(small: tuple[Oracle, Any]) -> None:
    engine = Engine(small[1], None, capacity=10)
    request = engine.submit([1, 2, 3], Settings(max_new_tokens=50))
    while engine.busy:
        engine.step()
    assert (len(request.tokens), request.finish_reason) == (10, "length")


@pytest.mark.parametrize(
    ("prompt", "problem"),
    [
        ([], "the prompt: is empty"),
        ([1, VOCAB], f"holds the token {VOCAB}, and the vocabulary is {VOCAB}"),
        ([1] * 64, "has 64 tokens, which leaves no room in a context of 64"),
    ],
)
def test_bad_prompts_are_refused(
    prompt: list[int], problem: str, small: tuple[Oracle, Any]
) -> None:
    with pytest.raises(BadInput, match=problem):
        Engine(small[1], None).submit(prompt, Settings())


def test_engine_that_would_not_fit_the_memory_is_refused(shakespeare: Artifact) -> None:
    with pytest.raises(BackendFailed, match=r"needs .* GiB, and .* GiB of memory is free"):
        TextGenerator(shakespeare, rows=10_000_000, capacity=512)
