"""Generators in XLA: static caches that are donated, a program for each number of new tokens."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("jax", reason="jax is not installed (pip install 'trivium[tpu]')")

import trivium
from tests.generation.conftest import SMALL, VOCAB, greedy
from tests.generation.oracle import Oracle
from tests.models.conftest import random_model
from trivium.backends.xla import platforms
from trivium.compiler import model as models
from trivium.compiler.artifact import Artifact
from trivium.compiler.errors import BadInput
from trivium.compiler.generation.engine import Engine
from trivium.compiler.generation.sampling import Settings
from trivium.compiler.generator import Decoder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    path = folder / "decoder.onnx"
    config = {"model_type": "llama", **SMALL, "num_hidden_layers": 1}
    models.save(random_model(config, folder), path)
    return path


def compiled(path: Path, out: Path, target: str = "cpu", **options: Any) -> Artifact:
    return trivium.compile(path, target, out=out, backend="xla", generator=True, **options)


def decoder_of(artifact: Artifact) -> Decoder[Any]:
    found: Decoder[Any] = artifact.load().generator()  # type: ignore[attr-defined]
    return found


def aliased(artifact: Artifact, program: str) -> int:
    """How many results of a compiled program lie where an argument lay."""
    text = (artifact.path / f"{program}.hlo.txt").read_text(encoding="utf-8")
    header = re.search(r"input_output_alias=\{(.*?)\}, entry_computation", text)
    return header[1].count("alias)") if header else 0


@pytest.mark.slow
def test_rows_that_differ_in_length_are_driven_together(llama: Path, tmp_path: Path) -> None:
    artifact = compiled(llama, tmp_path / "out", prefill=(4, 8), context=40, shape=["batch=3"])
    generator = artifact.generator
    assert generator is not None
    assert [(role.program, role.tokens) for role in generator.programs] == [
        ("decode", 1),
        ("prefill4", 4),
        ("prefill8", 8),
    ]
    assert {program.name for program in artifact.programs} == {"decode", "prefill4", "prefill8"}
    assert artifact.manifest["weights"] == "weights.safetensors"
    for name in ("decode", "prefill4", "prefill8"):
        assert aliased(artifact, name) == 2
    oracle, decoder = Oracle(llama), decoder_of(artifact)
    rng = np.random.default_rng(0)
    rows: list[list[int]] = [[], [], []]
    cache = decoder.start(rows=3)
    for counts in ((3, 11, 6), (1, 1, 1), (2, 0, 5), (1, 1, 1), (9, 9, 9)):
        new = [[int(token) for token in rng.integers(0, VOCAB, count)] for count in counts]
        found = decoder.feed(cache, new, keep=2)
        for row, (had, added) in enumerate(zip(rows, new, strict=True)):
            rows[row] = had + added
            kept = min(2, len(added))
            if kept:
                expected = oracle(rows[row])[-kept:]
                np.testing.assert_allclose(found[row, -kept:], expected, atol=5e-5)
        assert cache.lengths == [len(row) for row in rows]
    engine = Engine(decoder, None, rows=8)
    assert engine.rows == 3
    requests = [engine.submit(row[:n], Settings(max_new_tokens=n)) for n, row in enumerate(rows, 2)]
    requests += [engine.submit(row[:7], Settings(max_new_tokens=4)) for row in rows]
    while engine.busy:
        engine.step()
    for request in requests:
        logits = oracle(request.tokens)
        for place, token in enumerate(request.generated, request.prompt):
            assert logits[place - 1, token] >= logits[place - 1].max() - 1e-4
    decoder.truncate(cache, [4, 9, 1])
    rows = [row[:count] for row, count in zip(rows, (4, 9, 1), strict=True)]
    found = decoder.feed(cache, [[5], [6], [7]])
    for had, token, logits in zip(rows, (5, 6, 7), found, strict=True):
        np.testing.assert_allclose(logits[0], oracle([*had, token])[-1], atol=5e-5)


@pytest.mark.slow
def test_guesses_are_checked_by_a_program_of_their_own(llama: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"prefill": (8,), "context": 48, "guesses": 3}
    artifact = compiled(llama, tmp_path / "out", shape=["batch=2"], **options)
    assert {program.name for program in artifact.programs} == {"decode", "prefill8", "check4"}
    assert aliased(artifact, "check4") == 2
    oracle, decoder = Oracle(llama), decoder_of(artifact)
    cache = decoder.start(rows=2)
    rows = [[5, 6, 7, 8, 9, 1, 2], [3, 4]]
    found = decoder.feed(cache, rows, keep=3)
    for row, logits in zip(rows, found, strict=True):
        kept = min(3, len(row))
        np.testing.assert_allclose(logits[-kept:], oracle(row)[-kept:], atol=5e-5)
    found = decoder.feed(cache, [[1, 2, 3], [4, 5, 6]], keep=3)
    for row, new, logits in zip(rows, ([1, 2, 3], [4, 5, 6]), found, strict=True):
        np.testing.assert_allclose(logits, oracle([*row, *new])[-3:], atol=5e-5)
    runs = {}
    for speculate in (False, True):
        engine = Engine(decoder, None, rows=2, speculate=speculate)
        prompts = ([3, 1, 4, 1, 5] * 3, [7, 8] * 4)
        requests = [engine.submit(prompt, Settings(max_new_tokens=30)) for prompt in prompts]
        while engine.busy:
            engine.step()
        runs[speculate] = ([request.tokens for request in requests], engine.counts.steps)
    assert runs[True][0] == runs[False][0]
    assert engine.counts.accepted > 0
    assert runs[True][1] < runs[False][1]


def test_more_guesses_than_the_context_are_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="--guesses 16: the context is 16 tokens"):
        compiled(llama, tmp_path / "out", context=16, prefill=(4,), guesses=16)


@pytest.mark.slow
def test_more_rows_than_compiled_for_are_refused(llama: Path, tmp_path: Path) -> None:
    decoder = decoder_of(compiled(llama, tmp_path / "out", context=16, prefill=(4,)))
    with pytest.raises(BadInput, match="2 sequences at once, and the programs take 1; compile"):
        decoder.start(rows=2)


def test_prefill_beyond_the_context_is_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="--prefill 32: the context is 16 tokens"):
        compiled(llama, tmp_path / "out", context=16, prefill=(32,))


@pytest.mark.slow
def test_greedy_tokens_are_the_folder_s_reference(
    shared_data: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shared_data("llm-shakespeare")
    artifact = trivium.compile(
        folder, "cpu", out=tmp_path / "out", backend="xla", context=128, prefill=(32,)
    )
    expected = np.load(folder / "reference.npz")["greedy_ids"].tolist()
    assert greedy(decoder_of(artifact), expected[:32], 48) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "platform"),
    [("tpu-v5e:2x2", "tpu"), ("nvidia-h100-sxm", "cuda"), ("nvidia-h100-sxm:4", "cuda")],
)
def test_ahead_of_time_for_devices(
    target: str, platform: platforms.Platform, llama: Path, tmp_path: Path
) -> None:
    reason = platforms.missing(platform)
    if reason is not None:
        pytest.skip(reason)
    options: dict[str, Any] = {}
    spread = ":" in target
    if spread:
        recipe = tmp_path / "sharded.toml"
        recipe.write_text('name = "sharded"\n[[pass]]\nname = "shard"\nmesh = "dp=2,tp=2"\n')
        options = {"recipe": str(recipe), "shape": ["batch=2"]}
    artifact = compiled(llama, tmp_path / "out", target, context=64, prefill=(16,), **options)
    assert artifact.manifest["verification"]["status"] == "passed"
    for name in ("decode", "prefill16"):
        assert aliased(artifact, name) == 2
        one = artifact.manifest["details"]["xla"]["programs"][name]
        assert one["memory"]["aliased"] < 0
        if spread:
            # Rows along one axis of the mesh, heads along the other.
            assert len(one["partition"]["inputs"]["past_key.0"][:2]) == 2
            assert all(one["partition"]["inputs"]["past_key.0"][:2])
