"""An encoder and a decoder generate from caches: cross-attention's is computed once for a text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import trivium
from tests.models.conftest import random_model
from tests.models.test_t5 import SMALL, checkpoint
from trivium.compiler import model as models
from trivium.compiler import parts
from trivium.compiler.errors import BadInput
from trivium.compiler.generation import sourced
from trivium.compiler.generation.sampling import Settings

TEXTS = ([5, 9, 17, 30, 2, 8, 44, 1], [7, 3, 1], [21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["relu", "gated-gelu"])
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_greedy_tokens_are_those_of_transformers(backend: str, kind: str, tmp_path: Path) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino")
    folder = tmp_path / "t5"
    theirs = checkpoint(folder, "T5ForConditionalGeneration", feed_forward_proj=kind)
    import torch

    artifact = trivium.compile(
        folder, "cpu", backend=backend, out=tmp_path / "out", use_cache=False
    )
    verification = artifact.manifest["verification"]
    assert verification["status"] == "passed"
    assert verification["max_rel_error"] < 1e-4
    assert [program.name for program in artifact.programs] == ["encoder", "decoder"]
    assert artifact.generator is not None
    assert [info.name for info in artifact.inputs] == [
        "input_ids", "attention_mask", "decoder_input_ids"
    ]  # fmt: skip
    found = trivium.TextGenerator(artifact).complete(TEXTS, Settings(max_new_tokens=12))
    for text, one in zip(TEXTS, found, strict=True):
        target = [0]
        while len(target) <= 12 and target[-1] not in artifact.generator.eos:
            with torch.no_grad():
                logits = theirs(
                    input_ids=torch.tensor([text]), decoder_input_ids=torch.tensor([target])
                ).logits
            target.append(int(logits[0, -1].argmax()))
        assert list(one.tokens) == target[1:]


def test_the_decoder_reads_keys_and_values_and_not_the_source(tmp_path: Path) -> None:
    model = random_model({"model_type": "t5", **SMALL}, tmp_path)
    source = sourced.source_of(model)
    assert source is not None
    cut = sourced.cut(model, source)
    encoder, decoder = parts.split(model)
    # Keys and values of each of three layers, and the mask.
    assert len(cut.memory) == 2 * 3 + 1
    assert {value.name for value in decoder.model.graph.inputs} == {
        "decoder_input_ids", *cut.memory
    }  # fmt: skip
    reads = [node.op_type for node in decoder.model.graph].count("Attention")
    assert reads == 2 * 3
    assert [node.op_type for node in encoder.model.graph].count("Attention") == 2


def test_without_a_generator_it_is_one_program(tmp_path: Path) -> None:
    folder = tmp_path / "t5"
    folder.mkdir()
    model = random_model({"model_type": "t5", **SMALL}, folder)
    path = tmp_path / "t5.onnx"
    models.save(model, path)
    plain = trivium.compile(path, "cpu", out=tmp_path / "plain", generator=False, use_cache=False)
    made = trivium.compile(path, "cpu", out=tmp_path / "made", generator=True, use_cache=False)
    assert [program.name for program in plain.programs] == ["main"]
    assert made.generator is not None
    rng = np.random.default_rng(0)
    feed = {
        "input_ids": rng.integers(2, 50, (2, 9)),
        "attention_mask": np.array([[1] * 9, [1] * 4 + [0] * 5]),
        "decoder_input_ids": rng.integers(2, 50, (2, 6)),
    }
    expected = plain.load().run(feed)["logits"]
    np.testing.assert_allclose(made.load().run(feed)["logits"], expected, atol=1e-4)
    with pytest.raises(BadInput, match="no cache can be given to it"):
        trivium.compile(path, "cpu", out=tmp_path / "x", backend="xla", generator=True)
