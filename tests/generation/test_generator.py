"""Decoders compiled to generators: what is recognized, and that driving them piece by piece, with
rows that come, go, are cut and copied, gives what the source gives on whole sequences."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import trivium
from tests.generation.conftest import MORE, VOCAB, greedy
from tests.generation.oracle import Oracle
from tests.models.conftest import random_model
from trivium.compiler import model as models
from trivium.compiler.artifact import Artifact
from trivium.compiler.errors import BackendFailed, BadInput
from trivium.compiler.generator import Decoder, Generator


def compiled(path: Path, out: Path, **options: Any) -> Artifact:
    return trivium.compile(path, "cpu", out=out, generator=True, use_cache=False, **options)


def decoder_of(artifact: Artifact) -> Decoder[Any]:
    found: Decoder[Any] = artifact.load().generator()  # type: ignore[attr-defined]
    return found


@pytest.fixture(scope="module")
def pair(
    any_decoder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Oracle, Decoder[Any]]:
    out = tmp_path_factory.mktemp("generator") / "artifact"
    return Oracle(any_decoder), decoder_of(compiled(any_decoder, out))


ACTIONS = st.one_of(
    st.tuples(st.just("feed"), st.lists(st.integers(0, 5), min_size=4, max_size=4)),
    st.tuples(st.just("cut"), st.lists(st.integers(0, 3), min_size=4, max_size=4)),
    st.tuples(st.just("drop"), st.integers(0, 3)),
    st.tuples(st.just("add"), st.integers(1, 6)),
    st.tuples(st.just("copy"), st.integers(0, 3)),
)


@settings(max_examples=8, deadline=None)
@given(actions=st.lists(ACTIONS, min_size=1, max_size=6), seed=st.integers(0, 99))
def test_any_way_of_driving_gives_the_source_s_logits(
    pair: tuple[Oracle, Decoder[Any]], actions: list[tuple[str, Any]], seed: int
) -> None:
    oracle, decoder = pair
    rng = np.random.default_rng(seed)

    def some(count: int) -> list[int]:
        return [int(token) for token in rng.integers(0, VOCAB, count)]

    rows = [some(3)]
    cache = decoder.start(capacity=60)
    decoder.feed(cache, rows)
    for action, what in actions:
        if action == "feed":
            new = [some(count) for count in what[: len(rows)]]
            if not any(new):
                continue
            found = decoder.feed(cache, new, keep=max(map(len, new)))
            rows = [row + added for row, added in zip(rows, new, strict=True)]
            for row, added, logits in zip(rows, new, found, strict=True):
                if added:
                    expected = oracle(row)[-len(added) :]
                    np.testing.assert_allclose(logits[-len(added) :], expected, atol=5e-5)
        elif action == "cut":
            rows = [row[: max(1, len(row) - n)] for row, n in zip(rows, what, strict=False)]
            decoder.truncate(cache, [len(row) for row in rows])
        elif action == "drop" and len(rows) > 1:
            kept = [index for index in range(len(rows)) if index != what % len(rows)]
            rows, cache = [rows[index] for index in kept], decoder.select(cache, kept)
        elif action in ("add", "copy") and len(rows) < 4:
            if action == "add":
                row, other = some(what), decoder.start(capacity=60)
                decoder.feed(other, [row])
            else:
                source = rows[what % len(rows)]
                row = source[: max(1, len(source) - 1)]
                other = decoder.copy(cache, what % len(rows), len(row))
            rows, cache = [*rows, row], decoder.join([cache, other])
        assert cache.lengths == [len(row) for row in rows]
    last = some(len(rows))
    found = decoder.feed(cache, [[token] for token in last])
    for row, token, logits in zip(rows, last, found, strict=True):
        np.testing.assert_allclose(logits[0], oracle([*row, token])[-1], atol=5e-5)


def test_greedy_tokens_are_the_folder_s_reference(
    shakespeare: Artifact, shared_data: Callable[[str], Path]
) -> None:
    assert shakespeare.manifest["verification"]["status"] == "passed"
    expected = np.load(shared_data("llm-shakespeare") / "reference.npz")["greedy_ids"].tolist()
    assert greedy(decoder_of(shakespeare), expected[:32], 48) == expected


def test_artifact_runs_as_the_model_it_was_made_from(
    shakespeare: Artifact, shared_data: Callable[[str], Path]
) -> None:
    reference = np.load(shared_data("llm-shakespeare") / "reference.npz")
    ids = np.pad(reference["prompt_ids"], ((0, 0), (3, 0)))
    mask = (np.arange(ids.shape[1]) >= 3).astype(np.int64)[None]
    logits = shakespeare.load().run({"input_ids": ids, "attention_mask": mask})["logits"]
    np.testing.assert_allclose(logits[0, 3:], reference["logits"], atol=1e-3)
    assert [info.name for info in shakespeare.inputs] == ["input_ids", "attention_mask"]


def test_manifest_says_how_to_drive_it(shakespeare: Artifact) -> None:
    generator = shakespeare.generator
    assert generator is not None
    assert (generator.context, generator.vocabulary, generator.eos) == (512, 1024, (0,))
    assert len(generator.caches) == 8
    assert generator.tokenizer == "tokenizer.json"
    assert Generator.from_json(json.loads(json.dumps(generator.to_json()))) == generator
    assert trivium.verify(shakespeare).status == "passed"


@pytest.mark.parametrize(
    ("key", "value"),
    [("form", "paged"), ("context", -1), ("caches", []), ("tokenizer", "../x"), ("more", 1)],
)
def test_damaged_generator_is_refused(
    shakespeare: Artifact, tmp_path: Path, key: str, value: Any
) -> None:
    table = {**shakespeare.manifest["generator"], key: value}
    (tmp_path / "manifest.json").write_text(
        json.dumps({**shakespeare.manifest, "generator": table}), encoding="utf-8"
    )
    with pytest.raises(BadInput, match="manifest is damaged"):
        Artifact.open(tmp_path, checked=False)


def test_cache_that_would_not_fit_is_refused_before_allocation(shakespeare: Artifact) -> None:
    with pytest.raises(BackendFailed, match=r"1000000 x 512 tokens needs \d+.\d\d GiB"):
        decoder_of(shakespeare).start(rows=1_000_000)


def test_longer_than_the_context_is_refused(shakespeare: Artifact) -> None:
    decoder = decoder_of(shakespeare)
    cache = decoder.start(capacity=9999)
    with pytest.raises(BadInput, match="513 tokens, and there is room for 512"):
        decoder.feed(cache, [[1] * 513])


@pytest.mark.parametrize("recipe", ["int4", "int8-weights", "fp16"])
def test_recipes_apply_to_generators(recipe: str, small_decoder: Path, tmp_path: Path) -> None:
    artifact = compiled(small_decoder, tmp_path / "out", recipe=recipe)
    assert artifact.manifest["verification"]["status"] == "passed"
    assert artifact.generator is not None
    assert artifact.generator.caches[0].dtype == ("float16" if recipe == "fp16" else "float32")


def test_onnx_file_is_a_generator_only_on_request(small_decoder: Path, tmp_path: Path) -> None:
    artifact = trivium.compile(small_decoder, "cpu", out=tmp_path / "out")
    assert artifact.generator is None
    artifact = compiled(small_decoder, tmp_path / "short", context=16)
    assert artifact.generator is not None
    assert artifact.generator.context == 16


def test_context_beyond_the_positions_is_refused(
    shared_data: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match="--context 513: the model has 512 positions"):
        trivium.compile(shared_data("llm-shakespeare"), "cpu", out=tmp_path / "o", context=513)


def test_what_is_no_decoder_cannot_be_a_generator(
    shared_data: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match="no cache can be given to it: it has no attention"):
        compiled(shared_data("models/mnist_cnn_cntk.onnx"), tmp_path / "out")


def test_bound_sequence_asks_for_the_plain_forward_pass(
    shared_data: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shared_data("llm-shakespeare")
    artifact = trivium.compile(folder, "cpu", out=tmp_path / "out", shape=["seq=16"])
    assert artifact.generator is None


@pytest.mark.parametrize(
    ("name", "width", "pieces"),
    [
        pytest.param("gpt2_tiny_past", 4, (5, 1, 1), marks=pytest.mark.slow),
        ("genai_tiny_gpt2_past", 1000, (4, 1, 2)),
    ],
)
def test_decoder_that_has_caches_is_recognized(
    name: str,
    width: int,
    pieces: tuple[int, ...],
    shared_data: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    artifact = trivium.compile(shared_data(f"models/{name}.onnx"), "cpu", out=tmp_path / "out")
    generator = artifact.generator
    assert generator is not None
    assert generator.caches[0].past == "past_0"
    assert (generator.caches[0].batch_axis, generator.caches[0].length_axis) == (1, 3)
    decoder = decoder_of(artifact)
    tokens = list(range(1, sum(pieces) + 1))
    whole = decoder.feed(decoder.start(), [tokens], keep=len(tokens))
    assert whole.shape == (1, len(tokens), width)
    cache, seen, found = decoder.start(), 0, []
    for size in pieces:
        found.append(decoder.feed(cache, [tokens[seen : seen + size]], keep=size))
        seen += size
    np.testing.assert_allclose(np.concatenate(found, axis=1), whole, atol=1e-5)


def test_rows_of_any_lengths_are_fed_in_place(shakespeare: Artifact) -> None:
    """Rows end where they end; nothing is moved for another that gets more tokens, or fewer."""
    decoder = decoder_of(shakespeare)
    assert decoder.generator.form == "ragged"
    texts = [[5, 6, 7, 8, 9, 10], [11, 12], [13, 14, 15, 16]]
    alone = []
    for text in texts:
        cache = decoder.start(capacity=40)
        decoder.feed(cache, [text])
        alone.append(decoder.feed(cache, [[20, 21]], keep=2)[0])
    cache = decoder.start(rows=3, capacity=40)
    buffers = cache.buffers
    decoder.feed(cache, [[5], [11, 12], [13, 14, 15, 16, 17]])
    decoder.feed(cache, [[6, 7, 8, 9, 10], [], []])
    decoder.truncate(cache, [6, 2, 4])
    found = decoder.feed(cache, [[20, 21]] * 3, keep=2)
    assert cache.lengths == [8, 4, 6]
    assert cache.buffers is buffers
    np.testing.assert_allclose(found, alone, atol=5e-5)


def test_windows_need_rows_that_share_slots(tmp_path: Path) -> None:
    source = tmp_path / "decoder.onnx"
    models.save(random_model(MORE["gemma3"], tmp_path), source)
    assert decoder_of(compiled(source, tmp_path / "out")).generator.form == "shared"
