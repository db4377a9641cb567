"""What a language model makes of a prompt: attention that sums to one, gradients that add up."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from trivium.compiler import cli, prepare
from trivium.compiler.errors import BadInput
from trivium.compiler.explain.prompt import PromptExplanation, _cut, explain_prompt
from trivium.compiler.explain.prompt_inputs import prompt_feeds
from trivium.models import digits

PROMPT = "First Citizen:\nBefore we proceed any"


@pytest.fixture(scope="module")
def model(shared_data: Callable[[str], Path]) -> Path:
    return shared_data("llm-shakespeare")


@pytest.fixture(scope="module")
def found(model: Path) -> PromptExplanation:
    return explain_prompt(model, PROMPT, gradients=False)


def test_every_head_of_every_layer_looks_at_what_came_before(found: PromptExplanation) -> None:
    assert len(found.attention) == 4
    for one in found.attention:
        assert one.weights.shape == (8, len(found.ids), len(found.ids))
        np.testing.assert_allclose(one.weights.sum(axis=-1), 1.0, atol=1e-5)
        assert (np.triu(one.weights, 1) == 0).all()
    assert "".join(found.tokens) == PROMPT


def test_the_first_layers_attention_is_that_of_its_projections(
    model: Path, found: PromptExplanation
) -> None:
    """Softmax(q k^T / sqrt(d)) of what the graph's own Attention reads, by numpy."""
    from trivium.compiler.explain import instrument

    graph, _ = prepare.optimize(model, "none")
    node = next(n for n in graph.graph if n.op_type == "Attention")
    feeds = prompt_feeds(graph, found.ids)
    copy = graph.clone()
    twin = next(n for n in copy.graph if n.name == node.name)
    copy.graph.outputs[:] = [v for v in twin.inputs[:2] if v is not None]
    q, k = (np.asarray(a, np.float64) for a in instrument.session(copy)(feeds))
    if q.ndim == 3:
        q = q.reshape(1, q.shape[1], 8, -1).transpose(0, 2, 1, 3)
        k = k.reshape(1, k.shape[1], 4, -1).transpose(0, 2, 1, 3)
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    scale = node.attributes["scale"].as_float() if "scale" in node.attributes else None
    scores = q @ k.swapaxes(-1, -2) * (scale or q.shape[-1] ** -0.5)
    scores[..., ~np.tri(len(found.ids), dtype=bool)] = -np.inf
    share = np.exp(scores - scores.max(-1, keepdims=True))
    share /= share.sum(-1, keepdims=True)
    np.testing.assert_allclose(found.attention[0].weights, share[0], atol=1e-5)


def test_embeddings_in_place_of_tokens_give_the_same_logits(model: Path) -> None:
    from trivium.compiler.explain import instrument

    graph, _ = prepare.optimize(model, "none")
    ids = [5, 17, 300, 2]
    feeds = prompt_feeds(graph, ids)
    cut, table, name = _cut(graph)
    assert name == "input_ids"
    inputs = {value.name for value in cut.graph.inputs}
    rest = {k: v for k, v in feeds.items() if k in inputs}
    embedded = {**rest, "trivium/embedded": table[ids][None].astype(np.float32)}
    whole = instrument.session(graph.clone())(feeds)[0]
    np.testing.assert_allclose(instrument.session(cut)(embedded)[0], whole, atol=1e-5)


@pytest.mark.parametrize("flags", [[], ["--no-generator"]])
def test_an_artifact_looks_where_its_source_does(
    model: Path, found: PromptExplanation, tmp_path: Path, flags: list[str]
) -> None:
    """A generator attends in ONNX Runtime's GroupQueryAttention, over buffers with room."""
    line = ["compile", model, "--target", "cpu", "-o", tmp_path / "a"]
    assert cli.main([*map(str, line), *flags]) == 0
    own = explain_prompt(tmp_path / "a", found.ids, gradients=False)
    assert own.predicted == found.predicted
    assert [one.layer for one in own.attention] == [one.layer for one in found.attention]
    for one, other in zip(own.attention, found.attention, strict=True):
        np.testing.assert_allclose(one.weights, other.weights, atol=1e-4)


@pytest.mark.slow
def test_gradients_through_an_artifact_are_those_of_its_source(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("jax", reason="gradients need the extra trivium[tpu]")
    assert cli.main(["compile", str(model), "--target", "cpu", "-o", str(tmp_path / "a")]) == 0
    both = [explain_prompt(one, PROMPT, attention=False) for one in (model, tmp_path / "a")]
    source, own = (one.attribution for one in both)
    assert source is not None
    assert own is not None
    np.testing.assert_allclose(own.gradient_x_input, source.gradient_x_input, atol=1e-3)
    np.testing.assert_allclose(own.integrated, source.integrated, atol=1e-2)


@pytest.mark.slow
def test_gradients_add_up_and_the_command_shows_them(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("jax", reason="gradients need the extra trivium[tpu]")
    html = tmp_path / "prompt.html"
    line = ["explain", model, "--prompt", PROMPT, "--attention", "--gradients", "--html", html]
    assert cli.main([*map(str, line), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    gradients = document["gradients"]
    assert gradients["missing"] < 0.02
    assert len(gradients["integrated"]) == len(document["tokens"])
    assert np.abs(gradients["gradient_x_input"]).max() > 0
    assert 'id="heads"' in html.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("ids", "says"), [([], "0 tokens"), ([1] * 600, "600 tokens"), ([99999], "no token 99999")]
)
def test_a_wrong_prompt_says_what_is_taken(model: Path, ids: list[int], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        explain_prompt(model, ids)


def test_a_model_of_images_is_no_language_model() -> None:
    with pytest.raises(BadInput, match="no language model"):
        explain_prompt(digits.cnn(), [1, 2])


def test_nothing_to_explain_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", str(digits.cnn())]) == 2
    assert "--prompt TEXT" in capsys.readouterr().err
