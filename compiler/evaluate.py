"""Quality of a model or an artifact on data: accuracy, perplexity, agreement with the source.

Data is an ``.npz`` with ``x`` (or arrays named as the inputs) and ``y``; for perplexity a text, the
token ids as an ``.npy``, or ``ids`` in an ``.npz``. Outputs are shown to a metric batch by batch
(`trivium.compiler.metrics`) and not kept.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trivium.compiler import dataset, files, metrics
from trivium.compiler import model as models
from trivium.compiler.artifact import Artifact, is_artifact
from trivium.compiler.dataset import Dataset
from trivium.compiler.errors import BackendFailed, BadInput
from trivium.compiler.metrics import Evaluation
from trivium.compiler.onnx_api import one_line
from trivium.compiler.types import TensorInfo

__all__ = ["Evaluation", "Runner", "evaluate", "read_data", "runner", "score"]

OUTPUT_BYTES = 64 << 20
"""Most bytes of the first output in one call, where the batch is free."""

Run = Callable[[Mapping[str, Any]], Mapping[str, Any]]
Counted = Callable[[int, int], None]
"""Told how many batches are done, of how many."""


def uncounted(done: int, total: int) -> None:
    """A count that nobody looks at."""


@dataclass(frozen=True)
class Runner:
    """Something to evaluate, ready to run."""

    run: Run
    inputs: Sequence[TensorInfo]
    outputs: Sequence[TensorInfo]


def evaluate(
    path: str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    metric: str = "accuracy",
    window: int = 256,
    against: str | os.PathLike[str] | None = None,
    count: Counted = uncounted,
) -> Evaluation:
    """Evaluate a model or an artifact.

    Args:
        path: An artifact, an ``.onnx`` file or a checkpoint folder (run on ONNX Runtime).
        data: See the module.
        metric: ``accuracy`` compares the first output's argmax with ``y``; ``cosine`` and ``mse``
            compare it with ``y`` as it is; ``perplexity`` takes the first output as logits;
            ``map:NAME`` is a function (`trivium.compiler.metrics`).
        window: Tokens in one non-overlapping window, for perplexity.
        against: A model or artifact whose first output stands in for ``y``: agreement with the
            source, on data without labels.
        count: Told of every batch.

    Raises:
        BadInput: The data does not fit the model or the metric.
    """
    metrics.make(metric)  # a misspelt name shows before anything is loaded
    chosen = runner(Path(path))
    rows = read_data(Path(data), chosen, Path(path), metric=metric, window=window)
    source = runner(Path(against)) if against is not None else None
    return score(chosen, rows, metric, against=source, count=count)


def read_data(
    data: Path, chosen: Runner, model: Path, *, metric: str, window: int = 256
) -> Dataset:
    """Read what a metric needs in the form that a model takes."""
    if metric == "perplexity":
        return dataset.read_tokens(data, chosen.inputs, model, window=window)
    return dataset.read(data, chosen.inputs)


def score(
    chosen: Runner,
    data: Dataset,
    metric: str,
    *,
    against: Runner | None = None,
    count: Counted = uncounted,
) -> Evaluation:
    """Run a model over data and show its outputs to a fresh metric."""
    shown = metrics.make(metric)
    most = batch_of(chosen, data)
    size = dataset.fixed_batch(chosen.inputs) or most
    total = -(-len(data) // size)
    for done, (feed, rows, rows_here) in enumerate(data.batches(chosen.inputs, most)):
        count(done, total)
        outputs = _cut(chosen.run(feed), rows_here)
        if against is not None:
            expected = _cut(against.run(_renamed(feed, chosen, against)), rows_here)
            rows = {**rows, "y": next(iter(expected.values()))}
        shown.update(outputs, rows)
    count(total, total)
    return shown.result()


def batch_of(chosen: Runner, data: Dataset) -> int:
    """How many samples one call may hold, so that its first output stays small."""
    sizes = {
        dim: size
        for info in chosen.inputs
        for dim, size in zip(info.shape[1:], data.feeds[info.name].shape[1:], strict=False)
    }
    shape = chosen.outputs[0].shape[1:] if chosen.outputs else ()
    known = [dim if isinstance(dim, int) else int(sizes.get(dim, 1)) for dim in shape]
    return max(1, min(dataset.BATCH, OUTPUT_BYTES // max(1, 4 * math.prod(known))))


def _cut(outputs: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """Outputs without what padding added; those without samples first stay as they are."""
    arrays = {name: np.asarray(array) for name, array in outputs.items()}
    first = next(iter(arrays.values()))
    if first.ndim == 0 or len(first) < rows:
        raise BadInput(
            f"the first output has shape {list(first.shape)}, not one row for each sample",
            about="--data",
        )
    size = len(first)
    return {n: a[:rows] if a.ndim and len(a) == size else a for n, a in arrays.items()}


def _renamed(feed: Mapping[str, Any], chosen: Runner, source: Runner) -> Mapping[str, Any]:
    """Feeds for the source: by name, or in order where the names differ."""
    if all(info.name in feed for info in source.inputs):
        return {info.name: feed[info.name] for info in source.inputs}
    if len(source.inputs) != len(chosen.inputs):
        raise BadInput(
            f"takes {len(source.inputs)} inputs, the model {len(chosen.inputs)}", about="--against"
        )
    pairs = zip(source.inputs, chosen.inputs, strict=True)
    return {theirs.name: feed[ours.name] for theirs, ours in pairs}


def runner(path: Path) -> Runner:
    """Load a model or an artifact to be evaluated."""
    if is_artifact(path):
        artifact = Artifact.open(path)
        executable = artifact.load()
        # Of a generator, the manifest describes the whole and a program one step.
        outputs = tuple(
            TensorInfo(one["name"], one["dtype"], tuple(one["shape"]))
            for one in artifact.manifest["outputs"]
        )
        return Runner(executable.run, executable.inputs, outputs)
    model = models.load(path)
    inputs, outputs = models.signature(model)
    with tempfile.TemporaryDirectory(prefix="trivium-") as folder:
        if files.is_folder(path):
            path = models.save(model, Path(folder) / "model.onnx")[0]
        run = session_run(path, [info.name for info in outputs])
    return Runner(run, inputs, outputs)


def session_run(path: Path, names: Sequence[str]) -> Run:
    """Open a file with ONNX Runtime; the function that runs it."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    # Left alone it rounds the activations of products with stored 4 bits, which the graph does not.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    try:
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises a dozen kinds without a common base
        raise BackendFailed(
            one_line(error),
            about="onnxruntime",
            remedy="compile the model, which repairs more, and evaluate the artifact",
        ) from error

    def run(feeds: Mapping[str, Any]) -> Mapping[str, Any]:
        try:
            return dict(zip(names, session.run(list(names), dict(feeds)), strict=True))
        except Exception as error:  # as above
            raise BackendFailed(one_line(error), about="onnxruntime") from error

    return run
