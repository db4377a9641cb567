"""BERT from a real checkpoint: MiniLM against an independent implementation in numpy, against
transformers where it is installed, and as a compiled artifact on real sentences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import trivium
from trivium.compiler import model as models
from trivium.compiler.errors import BadInput, Unsupported

from .conftest import assert_normal_form, run

SENTENCES = [
    "A man is eating food.",
    "Someone is having a meal.",
    "The stock market fell sharply after the announcement.",
]


@pytest.fixture(scope="module")
def model(minilm: Path) -> ir.Model:
    return models.load(minilm)


def feeds(minilm: Path) -> dict[str, np.ndarray[Any, Any]]:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(minilm / "tokenizer.json"))
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(SENTENCES)
    return {
        "input_ids": np.array([e.ids for e in encoded]),
        "attention_mask": np.array([e.attention_mask for e in encoded]),
        "token_type_ids": np.array([e.type_ids for e in encoded]),
    }


def numpy_bert(
    weights: dict[str, np.ndarray[Any, Any]], feed: dict[str, np.ndarray[Any, Any]]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """MiniLM in float64, from the paper: last_hidden_state and sentence_embedding."""
    from math import erf

    heads = 12

    def linear(x: Any, name: str) -> Any:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x: Any, name: str) -> Any:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12)
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def split(x: Any) -> Any:
        return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)

    gelu = np.vectorize(lambda v: 0.5 * v * (1 + erf(v / 2**0.5)))
    ids, mask = feed["input_ids"], feed["attention_mask"]
    x = weights["embeddings.word_embeddings.weight"][ids]
    x = x + weights["embeddings.position_embeddings.weight"][: ids.shape[1]]
    x = x + weights["embeddings.token_type_embeddings.weight"][feed["token_type_ids"]]
    x = norm(x, "embeddings.LayerNorm")
    for index in range(6):
        layer = f"encoder.layer.{index}"
        q, k, v = (
            split(linear(x, f"{layer}.attention.self.{part}")) for part in ("query", "key", "value")
        )
        scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
        scores = np.where(mask[:, None, None, :] == 1, scores, -np.inf)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (scores / scores.sum(-1, keepdims=True)) @ v
        mixed = mixed.transpose(0, 2, 1, 3).reshape(x.shape)
        mixed = linear(mixed, f"{layer}.attention.output.dense")
        x = norm(mixed + x, f"{layer}.attention.output.LayerNorm")
        wide = gelu(linear(x, f"{layer}.intermediate.dense"))
        x = norm(linear(wide, f"{layer}.output.dense") + x, f"{layer}.output.LayerNorm")
    pooled = (x * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    return x, pooled / np.linalg.norm(pooled, axis=-1, keepdims=True)


def stored(model: ir.Model) -> dict[str, np.ndarray[Any, Any]]:
    """The weights as the checkpoint stores them, in float64."""
    weights = {}
    for name, value in model.graph.initializers.items():
        assert value.const_value is not None
        array = value.const_value.numpy().astype(np.float64)
        table = "embeddings" in name
        weights[name] = array if table or array.ndim != 2 else array.T
    return weights


def test_minilm_is_in_normal_form(model: ir.Model, tmp_path: Path) -> None:
    assert_normal_form(model, tmp_path)
    ops = [node.op_type for node in model.graph]
    assert ops.count("Attention") == 6
    assert ops.count("Gelu") == 6
    assert ops.count("LayerNormalization") == 13


def test_minilm_equals_bert_written_in_numpy(model: ir.Model, minilm: Path) -> None:
    feed = feeds(minilm)
    hidden, embedding = numpy_bert(stored(model), feed)
    actual = run(model, feed)
    valid = feed["attention_mask"] == 1
    np.testing.assert_allclose(actual["last_hidden_state"][valid], hidden[valid], atol=2e-5)
    np.testing.assert_allclose(actual["sentence_embedding"], embedding, atol=2e-6)


def test_padding_changes_no_embedding(model: ir.Model, minilm: Path) -> None:
    feed = feeds(minilm)
    length = int(feed["attention_mask"][0].sum())
    assert length < feed["input_ids"].shape[1]
    alone = run(model, {name: array[:1, :length] for name, array in feed.items()})
    batched = run(model, feed)
    np.testing.assert_allclose(
        batched["sentence_embedding"][0], alone["sentence_embedding"][0], atol=1e-6
    )


def test_compiled_minilm_knows_which_sentences_are_alike(minilm: Path, tmp_path: Path) -> None:
    artifact = trivium.compile(minilm, "cpu", out=tmp_path / "minilm")
    assert artifact.manifest["verification"]["status"] == "passed"
    embedding = artifact.load().run(feeds(minilm))["sentence_embedding"]
    cosine = embedding @ embedding.T
    np.testing.assert_allclose(np.diag(cosine), 1, atol=1e-5)
    assert cosine[0, 1] > 0.6
    assert abs(cosine[0, 2]) < 0.2


def test_sequence_longer_than_the_table_fails(model: ir.Model) -> None:
    from trivium.compiler.errors import BackendFailed

    ids = np.ones((1, 513), np.int64)
    with pytest.raises(BackendFailed, match="out of"):
        run(model, {"input_ids": ids, "attention_mask": ids, "token_type_ids": ids})


@pytest.mark.slow
@pytest.mark.parametrize("head", ["BertModel", "BertForMaskedLM", "BertForSequenceClassification"])
def test_random_bert_equals_transformers(head: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=3,
        intermediate_size=40, max_position_embeddings=16, hidden_act="gelu_new", num_labels=3,
        initializer_range=0.5, attn_implementation="eager",
    )  # fmt: skip
    theirs = getattr(transformers, head)(config).eval()
    theirs.save_pretrained(tmp_path)
    ids = np.random.default_rng(0).integers(0, 50, (2, 9))
    mask = np.ones_like(ids)
    mask[1, 6:] = 0
    feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": ids % 2}
    actual = run(models.load(tmp_path), feed)
    with torch.no_grad():
        expected = theirs(**{name: torch.tensor(array) for name, array in feed.items()})
    name = "last_hidden_state" if head == "BertModel" else "logits"
    valid = mask == 1 if actual[name].ndim == 3 else slice(None)
    np.testing.assert_allclose(actual[name][valid], expected[name].numpy()[valid], atol=1e-4)


def test_unknown_option_is_refused_by_name(minilm: Path, tmp_path: Path) -> None:
    import json

    for file in minilm.iterdir():
        if file.name != "config.json":
            (tmp_path / file.name).symlink_to(file)
    config = json.loads((minilm / "config.json").read_text())
    for change, kind, message in [
        ({"rotary": 3}, Unsupported, "rotary"),
        ({"position_embedding_type": "relative_key"}, Unsupported, "relative_key"),
        ({"architectures": ["BertForQuestionAnswering"]}, Unsupported, "QuestionAnswering"),
        ({"num_hidden_layers": "six"}, BadInput, "num_hidden_layers is 'six'"),
        ({"num_attention_heads": 7}, BadInput, "not a multiple"),
        ({"hidden_size": 396}, BadInput, "implies"),
        ({"num_hidden_layers": 7}, BadInput, "layer.6"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(kind, match=message) as caught:
            models.load(tmp_path)
        assert "\n" not in str(caught.value)


def test_how_it_pools_is_part_of_its_hash(minilm: Path, tmp_path: Path) -> None:
    import json
    import shutil

    files = ("config.json", "modules.json", "1_Pooling")
    for name in files:
        source = minilm / name
        copy = shutil.copytree if source.is_dir() else shutil.copyfile
        copy(source, tmp_path / name)
    before = models.content_hash(tmp_path)
    pooling = tmp_path / "1_Pooling" / "config.json"
    options = json.loads(pooling.read_text())
    pooling.write_text(json.dumps(options | {"pooling_mode_cls_token": True}))
    assert models.content_hash(tmp_path) != before
