"""Evaluation: metrics by their definitions, agreement with the source, texts, own functions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from trivium.compiler import dataset, metrics
from trivium.compiler.errors import BadInput, TriviumError
from trivium.compiler.evaluate import evaluate
from trivium.models import digits

OWN = """
def worst(outputs, data):
    return float(abs(outputs["logits"]).max() + data["offset"][0])
worst.higher_is_better = False

def broken(outputs, data):
    return outputs["nothing"]
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits' test images, labels, and an array that only a user's function reads."""
    *_, images, labels = digits.split()
    path = tmp_path_factory.mktemp("data") / "test.npz"
    np.savez(path, image=images, y=labels, offset=np.full(len(images), 7.0))
    return path


def logits(data: Path) -> np.ndarray:
    session = ort.InferenceSession(digits.cnn(), providers=["CPUExecutionProvider"])
    with np.load(data) as arrays:
        return np.asarray(session.run(None, {"image": arrays["image"]})[0])


def test_accuracy_counts_every_sample_once(data: Path) -> None:
    with np.load(data) as arrays:
        labels = arrays["y"]
    result = evaluate(digits.cnn(), data)
    assert result.samples == len(labels)
    assert result.value == pytest.approx((logits(data).argmax(1) == labels).mean())


@pytest.mark.parametrize(("metric", "perfect"), [("accuracy", 1), ("cosine", 1), ("mse", 0)])
def test_a_model_agrees_with_itself(data: Path, tmp_path: Path, metric: str, perfect: int) -> None:
    with np.load(data) as arrays:
        np.savez(tmp_path / "bare.npz", image=arrays["image"])
    seen: list[tuple[int, int]] = []
    result = evaluate(
        digits.cnn(), tmp_path / "bare.npz", metric=metric, against=digits.cnn(),
        count=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert result.value == pytest.approx(perfect, abs=1e-9)
    assert seen[-1] == (len(seen) - 1, len(seen) - 1)
    assert len(seen) > 2


def test_without_labels_the_error_names_the_remedy(data: Path, tmp_path: Path) -> None:
    with np.load(data) as arrays:
        np.savez(tmp_path / "bare.npz", image=arrays["image"])
    with pytest.raises(BadInput, match="--against MODEL"):
        evaluate(digits.cnn(), tmp_path / "bare.npz")


def test_a_function_of_the_users_sees_outputs_and_data(data: Path, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    result = evaluate(digits.cnn(), data, metric=f"map:{tmp_path}/own.py:worst")
    assert result.value == pytest.approx(float(np.abs(logits(data)).max() + 7.0))
    assert not result.higher_is_better
    assert not result.bounded


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("map:{folder}/own.py:missing", "no function 'missing' there"),
        ("map:{folder}/none.py:worst", "no such file"),
        ("map:{folder}/own.py:broken", "KeyError"),
        ("map:nowhere", "no metric named 'nowhere'"),
        ("map:no_such_package:f", "cannot import"),
        ("f1", "no metric 'f1'"),
    ],
)
def test_a_wrong_name_is_one_line(data: Path, tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / "own.py").write_text(OWN)
    with pytest.raises(TriviumError, match=says) as caught:
        evaluate(digits.cnn(), data, metric=name.format(folder=tmp_path))
    assert "\n" not in str(caught.value)


def test_average_precision_is_that_of_scikit_learn() -> None:
    from sklearn.metrics import average_precision_score

    rng = np.random.default_rng(0)
    scores, labels = rng.standard_normal((60, 5)), rng.integers(0, 5, 60)
    ours = metrics.average_precision({"scores": scores}, {"y": labels})
    theirs = average_precision_score(labels[:, None] == np.arange(5), scores, average="macro")
    assert ours == pytest.approx(theirs)


def test_perplexity_is_its_formula_and_skips_padding() -> None:
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((2, 3, 4))
    labels = np.array([[1, 2, 3], [0, metrics.IGNORED, metrics.IGNORED]])
    shown = metrics.Perplexity()
    shown.update({"logits": scores}, {"y": labels})
    share = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    likely = [share[0, 0, 1], share[0, 1, 2], share[0, 2, 3], share[1, 0, 0]]
    assert shown.result().value == pytest.approx(float(np.exp(-np.log(likely).mean())))
    assert shown.result().samples == 4


def test_drops_are_points_or_shares() -> None:
    def of(value: float, **more: bool) -> metrics.Evaluation:
        return metrics.Evaluation("m", value, 1, **more)

    assert of(0.89).drop_from(of(0.9)) == pytest.approx(0.01)
    worse, better = (of(v, higher_is_better=False, bounded=False) for v in (33.0, 30.0))
    assert worse.drop_from(better) == pytest.approx(0.1)
    assert better.drop_from(worse) < 0


def test_a_text_is_read_with_the_models_own_tokenizer(
    shared_data: Callable[[str], Path], tmp_path: Path
) -> None:
    model = shared_data("llm-shakespeare")
    text = (model / "val.txt").read_text(encoding="utf-8")[:6000]
    (tmp_path / "part.txt").write_text(text, encoding="utf-8")
    ids = dataset.tokenize(tmp_path / "part.txt", model)
    assert (ids[:-2] == np.load(model / "val_ids.npy")[: len(ids) - 2]).all()
    np.save(tmp_path / "part.npy", ids)
    results = [
        evaluate(model, tmp_path / name, metric="perplexity") for name in ("part.txt", "part.npy")
    ]
    assert results[0] == results[1]
    assert results[0].samples == len(ids) - 1
    assert 10 < results[0].value < 100


def test_a_text_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("to be")
    with pytest.raises(BadInput, match=r"no tokenizer\.json"):
        dataset.tokenize(tmp_path / "text.txt", tmp_path / "model.onnx")
