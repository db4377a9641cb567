"""T5 against transformers at random small shapes: both kinds of feed-forward, and the encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trivium
from trivium.compiler import model as models
from trivium.compiler.errors import Unsupported

from .conftest import assert_normal_form, random_model, run

SMALL = {
    "vocab_size": 50, "d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 2,
    "num_decoder_layers": 3, "num_heads": 3, "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
}  # fmt: skip


def checkpoint(folder: Path, head: str, **options: Any) -> Any:
    """A random T5 of transformers, saved and returned."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    config = transformers.T5Config(**SMALL, **options)
    theirs = getattr(transformers, head)(config).eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.copy_(torch.randn_like(weight) * 0.3 + (weight.ndim == 1))
    theirs.save_pretrained(folder)
    return theirs


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["relu", "gated-gelu"])
def test_random_t5_equals_transformers(kind: str, tmp_path: Path) -> None:
    theirs = checkpoint(tmp_path, "T5ForConditionalGeneration", feed_forward_proj=kind)
    import torch

    rng = np.random.default_rng(0)
    ids, target = rng.integers(2, 50, (2, 30)), rng.integers(2, 50, (2, 17))
    mask = np.ones_like(ids)
    mask[1, 20:] = 0
    feed = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": target}
    actual = run(models.load(tmp_path), feed)
    with torch.no_grad():
        expected = theirs(**{name: torch.tensor(array) for name, array in feed.items()})
    np.testing.assert_allclose(actual["logits"], expected.logits.numpy(), atol=1e-4)


@pytest.mark.slow
def test_unscaled_t5_equals_transformers(tmp_path: Path) -> None:
    """T5 1.1 and Flan-T5 untie their head, and do not scale before it."""
    theirs = checkpoint(
        tmp_path, "T5ForConditionalGeneration", feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )  # fmt: skip
    import torch

    ids = np.random.default_rng(1).integers(2, 50, (1, 9))
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "decoder_input_ids": ids}
    actual = run(models.load(tmp_path), feed)
    with torch.no_grad():
        expected = theirs(**{name: torch.tensor(array) for name, array in feed.items()})
    np.testing.assert_allclose(actual["logits"], expected.logits.numpy(), atol=1e-4)


@pytest.mark.slow
def test_random_encoder_equals_transformers(tmp_path: Path) -> None:
    theirs = checkpoint(tmp_path, "T5EncoderModel")
    import torch

    ids = np.random.default_rng(2).integers(2, 50, (2, 21))
    mask = np.ones_like(ids)
    mask[0, :5] = 0
    feed = {"input_ids": ids, "attention_mask": mask}
    actual = run(models.load(tmp_path), feed)["last_hidden_state"]
    with torch.no_grad():
        expected = theirs(**{name: torch.tensor(array) for name, array in feed.items()})
    valid = mask == 1
    np.testing.assert_allclose(actual[valid], expected.last_hidden_state.numpy()[valid], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "furthest"), [(32, 128), (16, 128), (8, 20), (4, 12)])
def test_buckets_equal_those_of_transformers(count: int, furthest: int) -> None:
    torch = pytest.importorskip("torch")
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    from trivium.models.t5 import buckets

    distances = torch.arange(0, furthest + 1)
    theirs = t5.T5Attention._relative_position_bucket(
        -distances, bidirectional=False, num_buckets=count, max_distance=furthest
    )
    np.testing.assert_array_equal(buckets(count, furthest), theirs.numpy())


def test_t5_is_in_normal_form_and_compiles(tmp_path: Path) -> None:
    config = {"model_type": "t5", **SMALL}
    folder = tmp_path / "t5"
    folder.mkdir()
    model = random_model(config, folder)
    assert_normal_form(model, tmp_path)
    ops = [node.op_type for node in model.graph]
    assert ops.count("Attention") == 2 + 2 * 3
    models.save(model, tmp_path / "t5.onnx")
    artifact = trivium.compile(
        tmp_path / "t5.onnx", "cpu", out=tmp_path / "artifact", use_cache=False
    )
    assert artifact.manifest["verification"]["status"] == "passed"


def test_unknown_feed_forward_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "t5", **SMALL, "feed_forward_proj": "gated-maxout"})
    )
    from .conftest import write_safetensors

    write_safetensors(tmp_path / "model.safetensors", {})
    with pytest.raises(Unsupported, match="gated-maxout"):
        models.load(tmp_path)
