"""What a language model looks at: attention by layer and head, and what each token of a prompt did.

Attention is read from the graph's own Attention operators (or the Softmax of an opened one). The
gradients are those of the predicted token's logit by the embeddings of the prompt: gradient times
input at the prompt itself, and integrated gradients on the way to it from the average embedding,
whose sum is the difference in the logit (how nearly is reported). From embeddings of zero the sum
does not converge: normalization forgets scale, and all would happen in a point.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from trivium.compiler import dataset, prepare, recipe
from trivium.compiler import model as models
from trivium.compiler.artifact import Artifact, is_artifact
from trivium.compiler.errors import BadInput, ToolchainMissing
from trivium.compiler.explain import instrument
from trivium.compiler.explain.prompt_inputs import embeddings, prompt_feeds, tokens_input
from trivium.compiler.generator import Generator
from trivium.compiler.passing import is_op
from trivium.compiler.prepare import Progress, silent
from trivium.compiler.recipe import Context

Array = np.ndarray[Any, np.dtype[Any]]

STEPS = 64
"""Points on the way from the average embedding to the prompt at which gradients are taken."""

MOST_TOKENS = 512
"""Longest prompt: maps grow with its square."""

PROBABILITIES = {
    ("", "Attention"): ("qk_matmul_output_mode", 3),
    ("com.microsoft", "GroupQueryAttention"): ("qk_output", 2),
}
"""The attribute that makes an operator's fourth output its scores after the softmax."""


@dataclass(frozen=True)
class AttentionMap:
    """The attention of a layer: ``[heads, tokens, tokens]``, rows sum to one."""

    layer: str
    weights: Array


@dataclass(frozen=True)
class Attribution:
    """What each token of the prompt did to the predicted token's logit.

    Attributes:
        missing: How far the integrated gradients' sum is from the difference of the logit between
            the prompt and the average embedding in its place, relative to that difference.
    """

    gradient_x_input: Array
    integrated: Array
    logit: float
    missing: float


@dataclass(frozen=True)
class PromptExplanation:
    """What a model makes of a prompt."""

    model: str
    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    predicted: int
    predicted_text: str
    probability: float
    attention: tuple[AttentionMap, ...]
    attribution: Attribution | None

    def to_json(self) -> dict[str, Any]:
        """What ``trivium explain --prompt --json`` prints."""
        gradients = None
        if self.attribution is not None:
            gradients = {
                "logit": self.attribution.logit,
                "gradient_x_input": _rounded(self.attribution.gradient_x_input),
                "integrated": _rounded(self.attribution.integrated),
                "missing": self.attribution.missing,
            }
        return {
            "kind": "prompt",
            "model": self.model,
            "ids": list(self.ids),
            "tokens": list(self.tokens),
            "predicted": {
                "id": self.predicted,
                "text": self.predicted_text,
                "probability": self.probability,
            },
            "attention": [
                {"layer": one.layer, "heads": _rounded(one.weights)} for one in self.attention
            ],
            "gradients": gradients,
        }


def _rounded(array: Array) -> Any:
    return np.round(array.astype(np.float64), 5).tolist()


def explain_prompt(
    path: str | os.PathLike[str],
    prompt: str | Sequence[int],
    *,
    attention: bool = True,
    gradients: bool = True,
    progress: Progress = silent,
) -> PromptExplanation:
    """Run a prompt through a language model and say what it looked at.

    Args:
        path: A checkpoint folder, an ``.onnx`` file of ``[batch, sequence]`` ids, or an artifact
            that holds one.
        prompt: A text, read with the model's own tokenizer, or token ids.

    Raises:
        BadInput: The model is no language model, or has nothing of what is asked for.
        ToolchainMissing: Gradients without jax, a text without tokenizers.
    """
    place = Path(path)
    tokenizer = dataset.tokenizer_of(place) if isinstance(prompt, str) else None
    ids: list[int] = _ids(prompt) if tokenizer is None else tokenizer.encode(prompt).ids
    if not 0 < len(ids) <= MOST_TOKENS:
        raise BadInput(f"{len(ids)} tokens, where 1 to {MOST_TOKENS} are taken", about="--prompt")
    progress("reading the model")
    file, generator = _graph_of(place)
    model = models.load(file)
    prepare.run_recipe(model, recipe.read("none"), Context())
    feeds = prompt_feeds(model, ids, generator)
    progress("running the prompt")
    logits, maps = _run(model, feeds, attention)
    predicted = int(logits.argmax())
    scores = np.exp(logits - logits.max())
    found = None
    if gradients:
        progress("gradients")
        found = _attribute(model, feeds, predicted)

    def text(token: int) -> str:
        return tokenizer.decode([token]) if tokenizer is not None else str(token)

    return PromptExplanation(
        place.name,
        tuple(ids),
        tuple(map(text, ids)),
        predicted,
        text(predicted),
        float(scores[predicted] / scores.sum()),
        tuple(maps),
        found,
    )


def _ids(prompt: str | Sequence[int]) -> list[int]:
    return [int(token) for token in prompt]


def _graph_of(path: Path) -> tuple[Path, Generator | None]:
    """The file of the graph to look into; how it is driven, if an artifact says so."""
    if not is_artifact(path):
        return path, None
    artifact = Artifact.open(path)
    found = [artifact.path / one.file for one in artifact.programs if one.file.endswith(".onnx")]
    if not found:
        raise BadInput(
            f"the artifact of {artifact.manifest['backend']} holds no graph to look into",
            about=str(path),
            remedy="explain the source model, or an artifact of onnxruntime",
        )
    return found[0], artifact.generator


def _run(
    model: ir.Model, feeds: Mapping[str, Array], attention: bool
) -> tuple[Array, list[AttentionMap]]:
    """The last position's logits, and the attention maps if they are wanted."""
    copy = model.clone()
    seen = _expose(copy) if attention else []
    copy.graph.outputs[:] = [copy.graph.outputs[0], *(value for _, value in seen)]
    outputs = instrument.session(copy)(feeds)
    logits = np.asarray(outputs[0], np.float64)
    if logits.ndim != 3:
        raise BadInput(
            f"the first output has shape {list(logits.shape)}, no logits", about="--prompt"
        )
    maps = [
        AttentionMap(layer, _own_keys(np.asarray(array)[0].astype(np.float32)))
        for (layer, _), array in zip(seen, outputs[1:], strict=True)
    ]
    return logits[0, -1], maps


def _own_keys(scores: Array) -> Array:
    """Those of the prompt alone: a cache's buffer may have room for more."""
    return scores[..., : scores.shape[-2]]


def _expose(model: ir.Model) -> list[tuple[str, ir.Value]]:
    """Make the graph's attention probabilities values of their own."""
    found: list[tuple[str, ir.Value]] = []
    for node in list(model.graph):
        value = None
        if (node.domain, node.op_type) in PROBABILITIES:
            if len(node.outputs) < 4:
                node.resize_outputs(4)
            name, mode = PROBABILITIES[node.domain, node.op_type]
            node.attributes[name] = ir.AttrInt64(name, mode)
            for unused in node.outputs[1:3]:
                unused.name = unused.name or ""
            value = node.outputs[3]
            value.type = ir.TensorType(node.outputs[0].dtype or ir.DataType.FLOAT)
        elif is_op(node, "Softmax"):
            shape = node.outputs[0].shape
            value = node.outputs[0] if shape is not None and len(shape) == 4 else None
        if value is not None:
            value.name = value.name or f"trivium/attention_{len(found)}"
            found.append((node.name or value.name, value))
    if not found:
        raise BadInput(
            "the graph has no Attention operator and no Softmax over [batch, heads, queries, keys]",
            about="--attention",
        )
    return found


# --- gradients -----------------------------------------------------------------------------------


def _attribute(model: ir.Model, feeds: Mapping[str, Array], predicted: int) -> Attribution:
    try:
        import jax
        import jax.numpy as jnp

        import trivium
    except ImportError as error:
        raise ToolchainMissing(
            "jax is not installed", about="--gradients", remedy="pip install 'trivium[tpu]'"
        ) from error
    cut, table, name = _cut(model)
    rest = {k: v for k, v in feeds.items() if k in {value.name for value in cut.graph.inputs}}
    ids = feeds[name][0]
    embedded = np.asarray(table[ids], np.float32)[None]
    average = np.broadcast_to(table.mean(axis=0, dtype=np.float32), embedded.shape)
    graph = trivium.differentiable(cut)
    output = cut.graph.outputs[0].name or ""

    def logit(one: Any) -> Any:
        return graph(graph.weights, {**rest, EMBEDDED: one})[output][0, -1, predicted]

    with graph.precise():
        gradient = jax.jit(jax.value_and_grad(logit))
        value, at_prompt = gradient(jnp.asarray(embedded))
        nothing, _ = gradient(jnp.asarray(average))
        mean = np.zeros_like(embedded, np.float64)
        for step in range(STEPS):
            part = (step + 0.5) / STEPS
            _, there = gradient(jnp.asarray(average + part * (embedded - average)))
            mean += np.asarray(there, np.float64) / STEPS
    integrated = (mean * (embedded - average)).sum(axis=-1)[0]
    difference = float(value) - float(nothing)
    missing = abs(float(integrated.sum()) - difference) / max(abs(difference), 1e-12)
    by_input = (np.asarray(at_prompt, np.float64) * embedded).sum(axis=-1)[0]
    return Attribution(by_input, integrated, float(value), missing)


EMBEDDED = "trivium/embedded"
"""The input that takes the place of the tokens' embeddings."""


def _cut(model: ir.Model) -> tuple[ir.Model, Array, str]:
    """A copy that takes embeddings instead of tokens; the table that they are looked up in."""
    copy = model.clone()
    tokens = tokens_input(copy)
    gathers = embeddings(tokens)
    table = gathers[0].inputs[0]
    assert table is not None
    tensor = ir.convenience.get_const_tensor(table)
    assert tensor is not None
    array = np.asarray(tensor.numpy())
    first = gathers[0].outputs[0]
    entry = ir.Value(name=EMBEDDED, shape=first.shape, type=first.type)
    copy.graph.inputs.append(entry)
    for node in gathers:
        if node.inputs[0] is table:
            node.outputs[0].replace_all_uses_with(entry)
            copy.graph.remove(node, safe=True)
    if not tokens.uses():
        copy.graph.inputs.remove(tokens)
    copy.graph.outputs[:] = [copy.graph.outputs[0]]
    return copy, array, tokens.name or ""
