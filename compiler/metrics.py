"""Metrics: each sees the outputs batch by batch and keeps sums, so that data of any length fits.

A metric of the user's own is ``map:NAME``, a function from all outputs to one number: an entry
point of ``trivium.metrics``, or ``package.module:function``, or ``file.py:function``. It is called
once, with the outputs (name -> array, samples first) and the data's arrays (name -> array), and
returns a number; an attribute ``higher_is_better = False`` on it says that less is better.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from trivium.compiler import files, plugins
from trivium.compiler.errors import BackendFailed, BadInput

Array = np.ndarray[Any, np.dtype[Any]]
Arrays = Mapping[str, Array]

IGNORED = -1
"""The label of a position that no metric counts: padding behind the last token."""


@dataclass(frozen=True)
class Evaluation:
    """A metric, its value, and the number of samples (tokens for perplexity) behind it.

    Attributes:
        higher_is_better: Which way is better.
        bounded: Whether it lies between 0 and 1, so that a drop is a difference and no ratio.
    """

    metric: str
    value: float
    samples: int
    higher_is_better: bool = True
    bounded: bool = True

    def drop_from(self, baseline: Evaluation) -> float:
        """How much worse it is than a baseline, below 0 if better.

        The difference for a metric between 0 and 1 (0.01 is one point of accuracy), the share of
        the baseline for any other (0.01 is one percent of perplexity).
        """
        lost = baseline.value - self.value if self.higher_is_better else self.value - baseline.value
        if self.bounded:
            return lost
        return lost / abs(baseline.value) if baseline.value else (float("inf") if lost > 0 else 0.0)


class Metric(Protocol):
    """Something that outputs are shown to."""

    def update(self, outputs: Arrays, rows: Arrays) -> None:
        """Take the outputs of a batch and the data's arrays for the same samples."""
        ...

    def result(self) -> Evaluation:
        """The value over everything shown."""
        ...


def make(name: str) -> Metric:
    """Return a fresh metric by its name on the command line.

    Raises:
        BadInput: No such metric.
    """
    if name.startswith("map:"):
        return Mapped(name, function(name.removeprefix("map:")))
    made = METRICS.get(name)
    if made is None:
        raise BadInput(
            f"no metric {name!r}",
            about="--metric",
            remedy=f"one of {', '.join(METRICS)}, or map:NAME for a function of your own",
        )
    return made()


def _first(outputs: Arrays) -> Array:
    return np.asarray(next(iter(outputs.values())))


def _labels(rows: Arrays) -> Array:
    if "y" not in rows:
        raise BadInput(
            "has no array 'y' with what is expected",
            about="--data",
            remedy="add one, or compare with the source model: --against MODEL",
        )
    return np.asarray(rows["y"])


@dataclass
class Accuracy:
    """The share of samples (or positions) whose highest score is where the label says."""

    right: int = 0
    samples: int = 0

    def update(self, outputs: Arrays, rows: Arrays) -> None:
        scores, labels = _first(outputs), _labels(rows)
        scores = scores.reshape(len(scores), -1)
        predicted = scores.argmax(axis=1) if scores.shape[1] > 1 else scores[:, 0]
        labels = labels.reshape(len(labels), -1)
        wanted = labels.argmax(axis=1) if labels.shape[1] > 1 else labels[:, 0]
        self.right += int((predicted == wanted).sum())
        self.samples += len(scores)

    def result(self) -> Evaluation:
        return Evaluation("accuracy", self.right / max(1, self.samples), self.samples)


def _pair(outputs: Arrays, rows: Arrays) -> tuple[Array, Array]:
    have, want = _first(outputs), _labels(rows)
    if have.size != want.size:
        raise BadInput(
            f"'y' has shape {list(want.shape)}, the first output {list(have.shape)}",
            about="--data",
        )
    shape = (len(have), -1)
    return have.reshape(shape).astype(np.float64), want.reshape(shape).astype(np.float64)


@dataclass
class Cosine:
    """The mean over samples of the cosine between the first output and ``y``."""

    total: float = 0.0
    samples: int = 0

    def update(self, outputs: Arrays, rows: Arrays) -> None:
        have, want = _pair(outputs, rows)
        norms = np.linalg.norm(have, axis=1) * np.linalg.norm(want, axis=1)
        self.total += float(((have * want).sum(axis=1) / np.where(norms > 0, norms, 1.0)).sum())
        self.samples += len(have)

    def result(self) -> Evaluation:
        return Evaluation("cosine", self.total / max(1, self.samples), self.samples)


@dataclass
class MeanSquaredError:
    """The mean over all elements of (first output - y)^2."""

    total: float = 0.0
    elements: int = 0
    samples: int = 0

    def update(self, outputs: Arrays, rows: Arrays) -> None:
        have, want = _pair(outputs, rows)
        self.total += float(((have - want) ** 2).sum())
        self.elements += have.size
        self.samples += len(have)

    def result(self) -> Evaluation:
        value = self.total / max(1, self.elements)
        return Evaluation("mse", value, self.samples, higher_is_better=False, bounded=False)


@dataclass
class Perplexity:
    """exp(mean negative log-likelihood of the labels); the first output are logits."""

    total: float = 0.0
    tokens: int = 0

    def update(self, outputs: Arrays, rows: Arrays) -> None:
        logits, labels = _first(outputs), _labels(rows)
        if logits.ndim != 3 or labels.shape != logits.shape[:2]:
            raise BadInput(
                f"the first output has shape {list(logits.shape)}, not [batch, sequence, words]",
                about="perplexity",
            )
        for scores, wanted in zip(logits, labels, strict=True):  # a sequence at a time: float64
            kept = wanted != IGNORED
            wide = scores[kept].astype(np.float64)
            if not len(wide):
                continue
            wide -= wide.max(axis=-1, keepdims=True)
            likely = wide[np.arange(len(wide)), wanted[kept]] - np.log(np.exp(wide).sum(axis=-1))
            self.total -= float(likely.sum())
            self.tokens += len(wide)

    def result(self) -> Evaluation:
        if not self.tokens:
            raise BadInput("needs at least two tokens", about="--data")
        value = float(np.exp(self.total / self.tokens))
        return Evaluation("perplexity", value, self.tokens, higher_is_better=False, bounded=False)


@dataclass
class Mapped:
    """A function of the user's over all outputs, which are kept for it."""

    name: str
    function: Callable[[Arrays, Arrays], float]
    outputs: dict[str, list[Array]] = field(default_factory=dict)
    rows: dict[str, list[Array]] = field(default_factory=dict)

    def update(self, outputs: Arrays, rows: Arrays) -> None:
        for kept, batch in ((self.outputs, outputs), (self.rows, rows)):
            for name, array in batch.items():
                kept.setdefault(name, []).append(np.asarray(array))

    def result(self) -> Evaluation:
        outputs = {name: np.concatenate(parts) for name, parts in self.outputs.items()}
        rows = {name: np.concatenate(parts) for name, parts in self.rows.items()}
        try:
            value = float(self.function(outputs, rows))
        except BadInput:
            raise
        except Exception as error:  # whatever the user's own code raises
            text = f"{type(error).__name__}: {error}"
            raise BackendFailed(text, about=f"metric {self.name}") from error
        if not np.isfinite(value):
            raise BackendFailed(f"returned {value}", about=f"metric {self.name}")
        higher = bool(getattr(self.function, "higher_is_better", True))
        samples = len(next(iter(outputs.values())))
        return Evaluation(self.name, value, samples, higher, bounded=0.0 <= value <= 1.0)


METRICS: dict[str, Callable[[], Metric]] = {
    "accuracy": Accuracy,
    "perplexity": Perplexity,
    "cosine": Cosine,
    "mse": MeanSquaredError,
}


def function(name: str) -> Callable[[Arrays, Arrays], float]:
    """Find the function of a ``map:`` metric.

    Raises:
        BadInput: There is none of that name; the message says where was looked.
    """
    place, colon, attribute = name.rpartition(":")
    if name in MAPS:
        return MAPS[name]
    if not colon:
        found = plugins.get("trivium.metrics", name)
    elif place.endswith(".py"):
        found = getattr(_module_of(Path(place)), attribute, None)
    else:
        try:
            found = getattr(importlib.import_module(place), attribute, None)
        except ImportError as error:
            raise BadInput(f"cannot import {place!r} ({error})", about=f"map:{name}") from error
    if not callable(found):
        raise BadInput(
            f"no function {attribute or name!r} there",
            about=f"map:{name}",
            remedy="write map:package.module:function, map:file.py:function, or a plugin's name",
        )
    return found  # type: ignore[no-any-return]  # checked to be callable; the rest shows when called


def _module_of(path: Path) -> Any:
    files.require_file(path)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file raises
        raise BadInput(f"{type(error).__name__}: {error}", about=str(path)) from error
    return module


def average_precision(outputs: Arrays, data: Arrays) -> float:
    """``map:average-precision``: the mean over classes of the area under precision and recall.

    The first output holds a score for each class; ``y`` the class of each sample, or a 0 or 1 for
    each class. Classes without a positive sample do not count.
    """
    scores, labels = _first(outputs), _labels(data)
    scores = scores.reshape(len(scores), -1)
    labels = labels.reshape(len(labels), -1)
    if labels.shape[1] == 1 and scores.shape[1] > 1:
        labels = labels == np.arange(scores.shape[1])
    if labels.shape != scores.shape:
        raise BadInput(
            f"'y' has shape {list(labels.shape)}, the scores {list(scores.shape)}", about="--data"
        )
    areas = []
    for score, label in zip(scores.T, labels.T.astype(bool), strict=True):
        if not label.any():
            continue
        ranked = label[np.argsort(-score, kind="stable")]
        precision = np.cumsum(ranked) / np.arange(1, len(ranked) + 1)
        areas.append(float(precision[ranked].mean()))
    return float(np.mean(areas)) if areas else 0.0


MAPS: dict[str, Callable[[Arrays, Arrays], float]] = {"average-precision": average_precision}
"""The functions for ``map:`` that are here already."""
