"""Quality of a model or an artifact on data: accuracy, perplexity, agreement.

Data is an ``.npz`` with ``x`` (or arrays named as the inputs) and ``y``; for perplexity the token
ids as an ``.npy``, or as ``ids`` in an ``.npz``.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trivium.compiler import files
from trivium.compiler import model as models
from trivium.compiler.artifact import Artifact, is_artifact
from trivium.compiler.errors import BackendFailed, BadInput
from trivium.compiler.onnx_api import one_line
from trivium.compiler.samples import conform, numpy_dtype
from trivium.compiler.types import TensorInfo

Metric = Literal["accuracy", "perplexity", "cosine", "mse"]

BATCH = 32
"""Samples in one call where the model's batch is symbolic."""


@dataclass(frozen=True)
class Evaluation:
    """A metric, its value, and the number of samples (tokens for perplexity) behind it."""

    metric: str
    value: float
    samples: int


Run = Callable[[Mapping[str, Any]], Mapping[str, Any]]


def evaluate(
    path: str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    metric: Metric = "accuracy",
    window: int = 256,
) -> Evaluation:
    """Evaluate a model or an artifact.

    Args:
        path: An artifact, an ``.onnx`` file or a checkpoint folder (run on ONNX Runtime).
        data: See the module.
        metric: ``accuracy`` compares the first output's argmax with ``y``; ``cosine`` and ``mse``
            compare it with ``y`` as it is; ``perplexity`` takes the first output as logits.
        window: Tokens in one non-overlapping window, for perplexity.

    Raises:
        BadInput: The data does not fit the model or the metric.
    """
    run, inputs = _runner(Path(path))
    if metric == "perplexity":
        return _perplexity(run, inputs, _read_ids(Path(data)), window)
    feeds, labels = _read_labelled(Path(data), inputs)
    outputs = _outputs(run, inputs, feeds)
    return _METRICS[metric](outputs, labels)


def _runner(path: Path) -> tuple[Run, Sequence[TensorInfo]]:
    if is_artifact(path):
        executable = Artifact.open(path).load()
        return executable.run, executable.inputs
    model = models.load(path)
    inputs, outputs = models.signature(model)
    names = [info.name for info in outputs]
    with tempfile.TemporaryDirectory(prefix="trivium-") as folder:
        if files.is_folder(path):
            path = models.save(model, Path(folder) / "model.onnx")[0]
        session = _session(path)

    def run(feeds: Mapping[str, Any]) -> Mapping[str, Any]:
        try:
            return dict(zip(names, session.run(names, dict(feeds)), strict=True))
        except Exception as error:  # onnxruntime raises a dozen kinds without a common base
            raise BackendFailed(one_line(error), about="onnxruntime") from error

    return run, inputs


def _session(path: Path) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # as above
        raise BackendFailed(
            one_line(error),
            about="onnxruntime",
            remedy="compile the model, which repairs more, and evaluate the artifact",
        ) from error


def _load(path: Path) -> dict[str, Any]:
    import numpy as np

    files.require_file(path)
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {"ids": loaded}
        with loaded as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:  # numpy, zipfile and zlib raise their own kinds
        raise BadInput("not a readable .npz or .npy file", about=str(path)) from error


def _read_labelled(path: Path, inputs: Sequence[TensorInfo]) -> tuple[dict[str, Any], Any]:
    import numpy as np

    arrays = _load(path)
    if "y" not in arrays:
        raise BadInput("has no array 'y' with what is expected", about=str(path))
    feeds = {info.name: arrays[info.name] for info in inputs if info.name in arrays}
    if not feeds and len(inputs) == 1 and "x" in arrays:
        feeds = {inputs[0].name: arrays["x"]}
    missing = [info.name for info in inputs if info.name not in feeds]
    if missing:
        raise BadInput(
            f"has no array for the input {missing[0]!r}",
            about=str(path),
            remedy=f"it holds: {', '.join(arrays)}",
        )
    flat = [name for name, array in (*feeds.items(), ("y", arrays["y"])) if array.ndim == 0]
    if flat:
        raise BadInput(f"the array {flat[0]!r} has no axis of samples", about=str(path))
    counts = {name: len(array) for name, array in feeds.items()} | {"y": len(arrays["y"])}
    if len(set(counts.values())) != 1:
        raise BadInput(f"arrays of different lengths: {counts}", about=str(path))
    if not counts["y"]:
        raise BadInput("holds no samples", about=str(path))
    for info in inputs:
        feeds[info.name] = np.asarray(feeds[info.name])
    return feeds, arrays["y"]


def _batches(count: int, inputs: Sequence[TensorInfo]) -> Iterator[tuple[slice, int]]:
    """Slices of samples and the batch that the model takes; the last one is padded up to it."""
    fixed = [i.shape[0] for i in inputs if i.shape and isinstance(i.shape[0], int)]
    size = fixed[0] if fixed else min(BATCH, count)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count)), size if fixed else 0


def _outputs(run: Run, inputs: Sequence[TensorInfo], feeds: Mapping[str, Any]) -> Any:
    import numpy as np

    count = len(next(iter(feeds.values())))
    parts = []
    for rows, batch in _batches(count, inputs):
        feed = {}
        for info in inputs:
            array = feeds[info.name][rows]
            if batch > len(array):
                filler = np.repeat(array[-1:], batch - len(array), axis=0)
                array = np.concatenate([array, filler])
            feed[info.name] = conform(array, info, about="--data")
        first = np.asarray(next(iter(run(feed).values())))
        parts.append(first[: rows.stop - rows.start])
    return np.concatenate(parts)


def _accuracy(outputs: Any, labels: Any) -> Evaluation:
    scores = outputs.reshape(len(outputs), -1)
    predicted = scores.argmax(axis=1) if scores.shape[1] > 1 else scores[:, 0]
    labels = labels.reshape(len(labels), -1)
    wanted = labels.argmax(axis=1) if labels.shape[1] > 1 else labels[:, 0]
    return Evaluation("accuracy", float((predicted == wanted).mean()), len(outputs))


def _flat(outputs: Any, labels: Any) -> tuple[Any, Any]:
    import numpy as np

    if outputs.size != labels.size:
        raise BadInput(
            f"'y' has shape {list(labels.shape)}, the first output {list(outputs.shape)}",
            about="--data",
        )
    shape = (len(outputs), -1)
    return outputs.reshape(shape).astype(np.float64), labels.reshape(shape).astype(np.float64)


def _cosine(outputs: Any, labels: Any) -> Evaluation:
    import numpy as np

    have, want = _flat(outputs, labels)
    norms = np.linalg.norm(have, axis=1) * np.linalg.norm(want, axis=1)
    cosines = (have * want).sum(axis=1) / np.where(norms > 0, norms, 1.0)
    return Evaluation("cosine", float(cosines.mean()), len(outputs))


def _mse(outputs: Any, labels: Any) -> Evaluation:
    have, want = _flat(outputs, labels)
    return Evaluation("mse", float(((have - want) ** 2).mean()), len(outputs))


_METRICS: dict[str, Callable[[Any, Any], Evaluation]] = {
    "accuracy": _accuracy,
    "cosine": _cosine,
    "mse": _mse,
}


def _read_ids(path: Path) -> Any:
    arrays = _load(path)
    if "ids" not in arrays or arrays["ids"].ndim != 1 or arrays["ids"].dtype.kind not in "iu":
        raise BadInput(
            "perplexity needs a one-dimensional integer array of token ids",
            about=str(path),
            remedy="give an .npy, or an .npz with the array 'ids'",
        )
    return arrays["ids"]


def _perplexity(run: Run, inputs: Sequence[TensorInfo], ids: Any, window: int) -> Evaluation:
    """exp(mean negative log-likelihood) over non-overlapping windows, targets shifted by one."""
    import numpy as np

    tokens = next((i for i in inputs if i.dtype in ("int64", "int32") and len(i.shape) == 2), None)
    if tokens is None:
        raise BadInput("the model has no [batch, sequence] input of token ids", about="perplexity")
    if isinstance(tokens.shape[1], int):
        window = tokens.shape[1]
    total, count = 0.0, 0
    for start in range(0, len(ids) - 1, window):
        chunk = ids[start : start + window + 1]
        length = len(chunk) - 1
        fed = chunk[:-1]
        if length < window and isinstance(tokens.shape[1], int):
            fed = np.pad(fed, (0, window - length))
        feed = {}
        for info in inputs:
            value = fed if info is tokens else np.ones(len(fed))
            if "position" in info.name:
                value = np.arange(len(fed))
            feed[info.name] = value[None].astype(numpy_dtype(info.dtype))
        logits = np.asarray(next(iter(run(feed).values())))
        if logits.ndim != 3:
            raise BadInput(
                f"the first output has shape {list(logits.shape)}, not [batch, sequence, words]",
                about="perplexity",
            )
        scores = logits[0, :length].astype(np.float64)
        scores -= scores.max(axis=-1, keepdims=True)
        normalizer = np.log(np.exp(scores).sum(axis=-1))
        total -= float((scores[np.arange(length), chunk[1:]] - normalizer).sum())
        count += length
    if not count:
        raise BadInput("needs at least two tokens", about="--data")
    return Evaluation("perplexity", float(np.exp(total / count)), count)
