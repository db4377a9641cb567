"""A trained Llama-architecture model: its reference logits, greedy tokens and perplexity."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trivium

FOLDER = "llm-shakespeare"


@pytest.fixture(scope="module")
def checkpoint(shared_data: Callable[[str], Path]) -> Path:
    return shared_data(FOLDER)


@pytest.fixture(scope="module")
def executable(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("out") / "shakespeare"
    artifact = trivium.compile(checkpoint, "cpu", out=out, use_cache=False)
    assert artifact.manifest["verification"]["status"] == "passed"
    return artifact.load()


def logits(executable: Any, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    found: np.ndarray[Any, Any] = executable.run(
        {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    )["logits"]
    return found


def test_logits_equal_the_reference(checkpoint: Path, executable: Any) -> None:
    reference = np.load(checkpoint / "reference.npz")
    actual = logits(executable, reference["prompt_ids"])
    np.testing.assert_allclose(actual[0], reference["logits"], atol=1e-4)


def test_greedy_tokens_equal_the_reference(checkpoint: Path, executable: Any) -> None:
    """The reference continues its first 32 tokens; greedy is what each position makes likeliest."""
    ids = np.load(checkpoint / "reference.npz")["greedy_ids"]
    likeliest = logits(executable, ids[None])[0].argmax(-1)
    np.testing.assert_array_equal(likeliest[31:-1], ids[32:])


@pytest.mark.slow
def test_perplexity_equals_the_training_script_s(checkpoint: Path, executable: Any) -> None:
    metrics = json.loads((checkpoint / "metrics.json").read_text())
    ids = np.load(checkpoint / "val_ids.npy").astype(np.int64)
    window = metrics["context_for_eval"]
    whole = (ids.size - 1) // window
    inputs = ids[: whole * window].reshape(whole, window)
    targets = ids[1 : whole * window + 1].reshape(whole, window)
    nll = sum(_nll(executable, inputs[i : i + 8], targets[i : i + 8]) for i in range(0, whole, 8))
    rest = ids[whole * window :]
    nll += _nll(executable, rest[None, :-1], rest[None, 1:])
    assert metrics["val_targets"] == ids.size - 1
    assert np.exp(nll / (ids.size - 1)) == pytest.approx(metrics["val_ppl_token"], rel=1e-4)


def _nll(executable: Any, ids: np.ndarray[Any, Any], targets: np.ndarray[Any, Any]) -> float:
    scores = logits(executable, ids).astype(np.float64)
    top = scores.max(-1, keepdims=True)
    total = np.log(np.exp(scores - top).sum(-1)) + top[..., 0]
    chosen = np.take_along_axis(scores, targets[..., None], -1)[..., 0]
    return float((total - chosen).sum())
