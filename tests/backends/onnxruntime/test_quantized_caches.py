"""Caches in int8 change logits by little, whatever else is in the batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import trivium
from benchmarks import checkpoints
from trivium.compiler.errors import BadInput
from trivium.compiler.generation.sampling import Settings
from trivium.compiler.generation.text import TextGenerator


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> tuple[trivium.Artifact, ...]:
    folder = tmp_path_factory.mktemp("caches")
    source = checkpoints.write(folder, "1M")
    return tuple(
        trivium.compile(
            source, "cpu", recipe="int4", out=folder / held, use_cache=False,
            options={"kv_cache": held},
        )
        for held in ("f32", "int8")
    )  # fmt: skip


def test_logits_are_nearly_those_of_float_caches(
    artifacts: tuple[trivium.Artifact, ...],
) -> None:
    rng = np.random.default_rng(0)
    texts = [[int(t) for t in rng.integers(3, 500, size)] for size in (20, 7)]
    found = []
    for artifact in artifacts:
        decoder = artifact.load().generator()  # type: ignore[attr-defined]
        cache = decoder.start(2, 64)
        steps = [decoder.feed(cache, texts)[:, -1]]
        steps += [decoder.feed(cache, [[5, 9], [7]], keep=2)[:, -1], decoder.feed(cache, [[3]] * 2)]
        found.append(np.concatenate([step.reshape(2, -1) for step in steps]))
    want, have = found
    error = np.sqrt(np.mean((want - have) ** 2) / np.mean(want**2))
    assert 0 < error < 0.03


def test_caches_take_a_quarter_of_the_memory(artifacts: tuple[trivium.Artifact, ...]) -> None:
    wide, small = (artifact.generator for artifact in artifacts)
    assert wide is not None
    assert small is not None
    assert wide.bytes_per_token == 4 * small.bytes_per_token
    assert {cache.dtype for cache in small.caches} == {"int8"}


def test_company_and_guesses_change_no_token(artifacts: tuple[trivium.Artifact, ...]) -> None:
    prompts = [[5, 6, 7, 8] * 3, [9, 10, 11], [12, 13] * 5]
    asked = Settings(max_new_tokens=12)
    together = TextGenerator(artifacts[1], rows=3).complete(prompts, asked)
    alone = TextGenerator(artifacts[1], rows=1, speculate=False, prefix_bytes=0)
    for prompt, one in zip(prompts, together, strict=True):
        assert alone.complete([prompt], asked)[0].tokens == one.tokens


@pytest.mark.parametrize(
    ("options", "word"), [({"kv_cache": "int3"}, "int3"), ({"cache": "int8"}, "cache")]
)
def test_what_is_not_there_is_refused(options: dict[str, str], word: str, tmp_path: Path) -> None:
    source = checkpoints.write(tmp_path, "1M")
    with pytest.raises(BadInput, match=word):
        trivium.compile(source, "cpu", out=tmp_path / "out", use_cache=False, options=options)


def test_a_model_without_caches_is_refused(tmp_path: Path) -> None:
    source = checkpoints.write(tmp_path, "1M")
    with pytest.raises(BadInput, match="caches"):
        trivium.compile(
            source, "cpu", out=tmp_path / "out", use_cache=False, generator=False,
            shape=["seq=8"], options={"kv_cache": "int8"},
        )  # fmt: skip
