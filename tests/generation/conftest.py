"""What the tests of generators share: small decoders of several kinds, and the trained one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trivium
from tests.models.conftest import random_model
from trivium.compiler import model as models
from trivium.compiler.artifact import Artifact
from trivium.compiler.generator import Decoder

Array = np.ndarray[Any, Any]

VOCAB = 61
SMALL = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SMALL},
    "gpt2": {
        "model_type": "gpt2", "vocab_size": VOCAB, "n_positions": 64, "n_embd": 32, "n_layer": 2,
        "n_head": 4,
    },
    "gemma2": {"model_type": "gemma2", **SMALL, "head_dim": 8, "sliding_window": 4},
}  # fmt: skip


@pytest.fixture(scope="session", params=CONFIGS)
def small_decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ``.onnx`` file of a decoder without caches."""
    folder = tmp_path_factory.mktemp(request.param)
    path = folder / "decoder.onnx"
    models.save(random_model(CONFIGS[request.param], folder), path)
    return path


@pytest.fixture(scope="session")
def shakespeare(
    shared_data: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Artifact:
    """The trained model, compiled for this CPU."""
    out = tmp_path_factory.mktemp("shakespeare") / "artifact"
    return trivium.compile(shared_data("llm-shakespeare"), "cpu", out=out)


def greedy(decoder: Decoder[Any], prompt: list[int], count: int) -> list[int]:
    """The prompt and the likeliest tokens after it, fed one at a time."""
    cache = decoder.start()
    tokens, fed = list(prompt), list(prompt)
    for _ in range(count):
        fed = [int(decoder.feed(cache, [fed])[0, -1].argmax())]
        tokens += fed
    return tokens
