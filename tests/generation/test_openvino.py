"""Generators in OpenVINO: one stateful model whose variables are the caches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("openvino", reason="openvino is not installed")

import trivium
from tests.generation.conftest import CONFIGS, VOCAB, greedy
from tests.generation.oracle import Oracle
from tests.models.conftest import random_model
from trivium.backends.openvino import engine
from trivium.compiler import model as models
from trivium.compiler.artifact import Artifact
from trivium.compiler.errors import AccuracyFailed, BadInput
from trivium.compiler.generation.sampling import Settings
from trivium.compiler.generator import Decoder
from trivium.passes.insert_kv_cache import InsertKVCache

PEERS = ("lord", "liege", "gracious lord")


def compiled(path: Path, out: Path, **options: Any) -> Artifact:
    return trivium.compile(
        path, "cpu", out=out, backend="openvino", generator=True, use_cache=False, **options
    )


def decoder_of(artifact: Artifact) -> Decoder[Any]:
    found: Decoder[Any] = artifact.load().generator()  # type: ignore[attr-defined]
    return found


def layers(artifact: Artifact) -> dict[str, list[str]]:
    """The precisions of the layers that run, by their kind."""
    details = artifact.manifest["details"]
    path = str(artifact.path / artifact.programs[0].file)
    running = engine.compile_file(path, details["precision"], details["kv_cache_precision"])
    found: dict[str, list[str]] = {}
    for node in running.get_runtime_model().get_ops():
        info = node.get_rt_info()
        kind, precision = (info[key].astype(str) for key in ("layerType", "runtimePrecision"))
        found.setdefault(kind, []).append(precision)
    return found


@pytest.fixture(scope="module")
def shakespeare(
    shared_data: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Artifact:
    out = tmp_path_factory.mktemp("openvino") / "artifact"
    return compiled(shared_data("llm-shakespeare"), out)


def test_rows_of_different_lengths_come_go_and_are_cut(any_decoder: Path, tmp_path: Path) -> None:
    oracle, decoder = Oracle(any_decoder), decoder_of(compiled(any_decoder, tmp_path / "out"))
    rng = np.random.default_rng(0)

    def some(*counts: int) -> list[list[int]]:
        return [[int(token) for token in rng.integers(0, VOCAB, count)] for count in counts]

    def feed(cache: Any, rows: list[list[int]], new: list[list[int]]) -> list[list[int]]:
        found = decoder.feed(cache, new, keep=2)
        after = [row + added for row, added in zip(rows, new, strict=True)]
        assert cache.lengths == [len(row) for row in after]
        for row, added, logits in zip(after, new, found, strict=True):
            if kept := min(2, len(added)):
                np.testing.assert_allclose(logits[-kept:], oracle(row)[-kept:], atol=5e-5)
        return after

    cache = decoder.start(rows=2)
    rows = feed(cache, [[], []], some(3, 11))
    for counts in ((1, 1), (2, 5), (4, 0), (1, 1)):
        rows = feed(cache, rows, some(*counts))
    other = decoder.start()
    (third,) = feed(other, [[]], some(6))
    copied = decoder.copy(cache, 1, 9)
    cache = decoder.join([cache, other, copied])
    rows = feed(cache, [*rows, third, rows[1][:9]], some(1, 1, 1, 1))
    decoder.truncate(cache, [5, 7, 2, 9])
    rows = [row[:length] for row, length in zip(rows, (5, 7, 2, 9), strict=True)]
    rows = feed(cache, rows, some(3, 3, 3, 3))
    cache = decoder.select(cache, [2, 0])
    feed(cache, [rows[2], rows[0]], some(1, 1))


def test_greedy_tokens_are_the_folder_s_reference(
    shakespeare: Artifact, shared_data: Callable[[str], Path]
) -> None:
    manifest, generator = shakespeare.manifest, shakespeare.generator
    assert manifest["verification"]["status"] == "passed"
    assert manifest["verification"]["max_rel_error"] < 1e-5
    assert manifest["details"] == {"precision": "f32", "kv_cache_precision": "f32"}
    assert manifest["programs"][0]["file"] == "model.xml"
    assert generator is not None
    assert generator.form == "stateful"
    expected = np.load(shared_data("llm-shakespeare") / "reference.npz")["greedy_ids"].tolist()
    assert greedy(decoder_of(shakespeare), expected[:32], 48) == expected


def test_attention_runs_fused_with_its_caches(shakespeare: Artifact) -> None:
    running = layers(shakespeare)
    assert len(running["ScaledDotProductAttention"]) == 4
    assert "Softmax" not in running


def test_texts_that_share_calls_are_those_that_are_alone(shakespeare: Artifact) -> None:
    texts = ["ROMEO:", "JULIET:\nWhat", "First Citizen:"]
    settings = Settings(max_new_tokens=12, temperature=0.0)
    together = trivium.TextGenerator(shakespeare, rows=3).complete(texts, settings)
    alone = trivium.TextGenerator(shakespeare, rows=1)
    assert [one.text for one in together] == [alone.complete([t], settings)[0].text for t in texts]


def test_several_texts_are_guessed_ahead_and_stay_the_same(shakespeare: Artifact) -> None:
    texts = [f"KING RICHARD III:\nI'll not, my {lord}.\n\nKING RICHARD III:\n" for lord in PEERS]
    settings = Settings(max_new_tokens=60)
    plain = trivium.TextGenerator(shakespeare, rows=3, speculate=False)
    ahead = trivium.TextGenerator(shakespeare, rows=3)
    expected = [one.tokens for one in plain.complete(texts, settings)]
    assert [one.tokens for one in ahead.complete(texts, settings)] == expected
    assert ahead.engine.counts.accepted > 20
    assert ahead.engine.counts.steps < 0.9 * plain.engine.counts.steps


@pytest.mark.parametrize(("recipe", "precision"), [("int4", "i4"), ("int8-weights", "i8")])
def test_weights_stay_in_their_integers(
    recipe: str, precision: str, shared_data: Callable[[str], Path], tmp_path: Path
) -> None:
    # 688 rows of a projection are no whole number of blocks of 128.
    artifact = compiled(shared_data("llm-shakespeare"), tmp_path / "out", recipe=recipe)
    assert artifact.manifest["verification"]["status"] == "passed"
    assert set(layers(artifact)["FullyConnected"]) == {precision}


@pytest.mark.parametrize(("recipe", "held"), [("bf16", "bf16"), ("fp16", "f16")])
def test_half_precisions_hold_their_caches_likewise(
    recipe: str, held: str, shared_data: Callable[[str], Path], tmp_path: Path
) -> None:
    artifact = compiled(shared_data("llm-shakespeare"), tmp_path / "out", recipe=recipe)
    assert artifact.manifest["details"] == {"precision": held, "kv_cache_precision": held}
    assert len(layers(artifact)["ScaledDotProductAttention"]) == 4


def test_coarser_caches_are_for_who_asks_and_are_held_to_the_source(
    shared_data: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shared_data("llm-shakespeare")
    half = compiled(folder, tmp_path / "half", options={"kv_cache": "f16"})
    assert 1e-6 < half.manifest["verification"]["max_rel_error"] < 1e-3
    with pytest.raises(AccuracyFailed, match="does not compute what the graph says"):
        compiled(folder, tmp_path / "u8", options={"kv_cache": "u8"})
    with pytest.raises(BadInput, match=r"'f8'.*give f32, f16, bf16 or u8"):
        compiled(folder, tmp_path / "f8", options={"kv_cache": "f8"})
    with pytest.raises(BadInput, match="no option 'cache'"):
        compiled(folder, tmp_path / "x", options={"cache": "f16"})


def test_decoder_that_has_caches_is_driven_and_run_on_them(tmp_path: Path) -> None:
    model = random_model(CONFIGS["llama"], tmp_path)
    InsertKVCache(outputs="all")(model)
    path = tmp_path / "cached.onnx"
    models.save(model, path)
    rng = np.random.default_rng(0)
    feed: dict[str, Any] = {
        "input_ids": rng.integers(0, VOCAB, (1, 2)),
        "attention_mask": np.ones((1, 5), np.int64),
    }
    for index in range(2):
        for kind in ("key", "value"):
            past = rng.standard_normal((1, 2, 3, 8)).astype(np.float32)
            feed[f"past_{kind}.{index}"] = past
    # The comparison feeds caches, and holds those that come back to the source's.
    artifact = compiled(path, tmp_path / "out", calibration=[feed])
    assert artifact.manifest["verification"]["status"] == "passed"
    assert "past_key.0" in {info.name for info in artifact.inputs}
    decoder = decoder_of(artifact)
    whole = decoder.feed(decoder.start(), [[1, 2, 3, 4, 5]], keep=5)
    cache = decoder.start()
    pieces = [decoder.feed(cache, [piece], keep=len(piece)) for piece in ([1, 2, 3], [4], [5])]
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), whole, atol=1e-5)
