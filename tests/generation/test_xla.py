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
    decoder.truncate(cache, [4, 9, 1])
    rows = [row[:count] for row, count in zip(rows, (4, 9, 1), strict=True)]
    found = decoder.feed(cache, [[5], [6], [7]])
    for had, token, logits in zip(rows, (5, 6, 7), found, strict=True):
        np.testing.assert_allclose(logits[0], oracle([*had, token])[-1], atol=5e-5)


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
    ("target", "platform"), [("tpu-v5e:2x2", "tpu"), ("nvidia-h100-sxm", "cuda")]
)
def test_ahead_of_time_for_devices(
    target: str, platform: platforms.Platform, llama: Path, tmp_path: Path
) -> None:
    reason = platforms.missing(platform)
    if reason is not None:
        pytest.skip(reason)
    options: dict[str, Any] = {}
    if platform == "tpu":
        recipe = tmp_path / "sharded.toml"
        recipe.write_text('name = "sharded"\n[[pass]]\nname = "shard"\nmesh = "dp=2,tp=2"\n')
        options = {"recipe": str(recipe), "shape": ["batch=2"]}
    artifact = compiled(llama, tmp_path / "out", target, context=64, prefill=(16,), **options)
    assert artifact.manifest["verification"]["status"] == "passed"
    for name in ("decode", "prefill16"):
        assert aliased(artifact, name) == 2
        one = artifact.manifest["details"]["xla"]["programs"][name]
        assert one["memory"]["aliased"] < 0
        if platform == "tpu":
            # Rows along one axis of the mesh, heads along the other.
            assert len(one["partition"]["inputs"]["past_key.0"][:2]) == 2
            assert all(one["partition"]["inputs"]["past_key.0"][:2])
