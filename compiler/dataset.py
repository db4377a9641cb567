"""Data to evaluate on: an ``.npz`` of samples and labels, token ids, or a text.

All become the same: arrays with the samples first, some of which are the model's inputs. A text
is tokenized with the model's own ``tokenizer.json``; ids are cut into windows that do not overlap,
whose labels are the ids one further.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trivium.compiler import files
from trivium.compiler.errors import BadInput, ToolchainMissing
from trivium.compiler.metrics import IGNORED
from trivium.compiler.samples import conform, numpy_dtype
from trivium.compiler.types import TensorInfo

Array = np.ndarray[Any, np.dtype[Any]]

BATCH = 32
"""Samples in one call where the model's batch is symbolic."""

TEXT = (".txt", ".md")
"""Files that are read as text."""


@dataclass(frozen=True)
class Dataset:
    """Samples to evaluate on.

    Attributes:
        feeds: An array for each input of the model, samples first.
        rows: All other arrays, samples first: ``y``, and whatever a metric of the user's reads.
    """

    feeds: Mapping[str, Array]
    rows: Mapping[str, Array]

    def __len__(self) -> int:
        return len(next(iter(self.feeds.values())))

    def pick(self, count: int, seed: int = 0) -> Dataset:
        """Some of the samples, drawn at random, in their order; itself if there are no more."""
        if count >= len(self):
            return self
        chosen = np.sort(np.random.default_rng(seed).permutation(len(self))[:count])
        return Dataset(
            {name: array[chosen] for name, array in self.feeds.items()},
            {name: array[chosen] for name, array in self.rows.items()},
        )

    def batches(
        self, inputs: Sequence[TensorInfo], most: int = BATCH
    ) -> Iterator[tuple[dict[str, Array], dict[str, Array], int]]:
        """Feeds in the model's batch (the last one padded up to it), rows, and their number."""
        fixed = fixed_batch(inputs)
        size = fixed or max(1, min(most, len(self)))
        for start in range(0, len(self), size):
            here = slice(start, min(start + size, len(self)))
            count = here.stop - here.start
            feed = {}
            for info in inputs:
                array = self.feeds[info.name][here]
                if fixed and count < fixed:
                    array = np.concatenate([array, np.repeat(array[-1:], fixed - count, axis=0)])
                feed[info.name] = conform(array, info, about="--data")
            yield feed, {name: array[here] for name, array in self.rows.items()}, count


def fixed_batch(inputs: Sequence[TensorInfo]) -> int | None:
    """The batch that the model takes; None if the caller chooses."""
    sizes = [info.shape[0] for info in inputs if info.shape and isinstance(info.shape[0], int)]
    return sizes[0] if sizes else None


def read(path: Path, inputs: Sequence[TensorInfo]) -> Dataset:
    """Read an ``.npz`` with an array for each input (or ``x`` for the only one), and others.

    Raises:
        BadInput: It does not fit the model; the message names the array.
    """
    arrays = _load(path)
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
    taken = {*feeds, "x"}
    rows = {name: array for name, array in arrays.items() if name not in taken}
    needed = {**feeds, **({"y": rows["y"]} if "y" in rows else {})}
    flat = [name for name, array in needed.items() if array.ndim == 0]
    if flat:
        raise BadInput(f"the array {flat[0]!r} has no axis of samples", about=str(path))
    counts = {name: len(array) for name, array in needed.items()}
    if len(set(counts.values())) != 1:
        raise BadInput(f"arrays of different lengths: {counts}", about=str(path))
    count = next(iter(counts.values()))
    if not count:
        raise BadInput("holds no samples", about=str(path))
    spoiled = [n for n, a in feeds.items() if a.dtype.kind == "f" and not np.isfinite(a).all()]
    if spoiled:
        raise BadInput(f"the array {spoiled[0]!r} holds NaN or infinity", about=str(path))
    kept = {name: array for name, array in rows.items() if np.shape(array)[:1] == (count,)}
    return Dataset(feeds, kept)


def read_tokens(
    path: Path, inputs: Sequence[TensorInfo], model: Path, *, window: int, batch: int = 1
) -> Dataset:
    """Read a text or token ids as windows for a model of ``[batch, sequence]`` ids.

    Args:
        model: Where the tokenizer is, for a text: a checkpoint folder, an artifact, or a file
            beside which it lies.
        window: Tokens in a window, where the model leaves it open.
    """
    tokens = next((i for i in inputs if i.dtype in ("int64", "int32") and len(i.shape) == 2), None)
    if tokens is None:
        raise BadInput("the model has no [batch, sequence] input of token ids", about="perplexity")
    fixed = tokens.shape[1]
    window = fixed if isinstance(fixed, int) else window
    ids = tokenize(path, model) if path.suffix.lower() in TEXT else _read_ids(path)
    if len(ids) < 2:
        raise BadInput("needs at least two tokens", about=str(path))
    if int(ids.min()) < 0:
        raise BadInput(f"holds the token {int(ids.min())}, below 0", about=str(path))
    window = min(window, len(ids) - 1) if not isinstance(fixed, int) else window
    count = -(-(len(ids) - 1) // window)
    fed, labels = np.zeros((2, count * window), np.int64)
    fed[: len(ids) - 1], labels[: len(ids) - 1] = ids[:-1], ids[1:]
    labels[len(ids) - 1 :] = IGNORED
    shape = (count, window)
    feeds = {}
    for info in inputs:
        if info is tokens:
            array = fed.reshape(shape)
        elif len(info.shape) == 2 and info.dtype in ("int64", "int32", "bool", "float32"):
            line = np.arange(window) if "position" in info.name else np.ones(window)
            array = np.broadcast_to(line, shape)
        else:
            raise BadInput(
                f"the input {info.name!r} is neither tokens, mask nor positions", about="perplexity"
            )
        feeds[info.name] = array.astype(numpy_dtype(info.dtype))
    return Dataset(feeds, {"y": labels.reshape(shape)})


def tokenize(path: Path, model: Path) -> Array:
    """The token ids of a text file, by the tokenizer of a model.

    Raises:
        BadInput: There is no ``tokenizer.json`` with the model, or the file is no text.
        ToolchainMissing: The package ``tokenizers`` is not installed.
    """
    files.require_file(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadInput("not a text file", about=str(path)) from error
    return np.asarray(tokenizer_of(model).encode(text, add_special_tokens=False).ids, np.int64)


def tokenizer_of(model: Path) -> Any:
    """The tokenizer of a model: ``tokenizer.json`` in its folder, or beside its file.

    Raises:
        BadInput, ToolchainMissing: As `tokenize`.
    """
    folder = model if files.is_folder(model) else model.parent
    found = next((f for f in sorted(folder.rglob("tokenizer.json")) if f.is_file()), None)
    if found is None:
        raise BadInput(
            "no tokenizer.json with the model, so the text cannot be read",
            about=str(folder),
            remedy="put it there, or give token ids",
        )
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ToolchainMissing(
            "tokenizers is not installed", about=str(found), remedy="pip install 'trivium[hf]'"
        ) from error
    try:
        return Tokenizer.from_file(str(found))
    except Exception as error:  # the Rust side raises plain exceptions
        raise BadInput(f"not a tokenizer ({error})", about=str(found)) from error


def _load(path: Path) -> dict[str, Array]:
    files.require_file(path)
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {"ids": loaded}
        with loaded as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:  # numpy, zipfile and zlib raise their own kinds
        raise BadInput("not a readable .npz or .npy file", about=str(path)) from error


def _read_ids(path: Path) -> Array:
    arrays = _load(path)
    if "ids" not in arrays or arrays["ids"].ndim != 1 or arrays["ids"].dtype.kind not in "iu":
        raise BadInput(
            "perplexity needs a one-dimensional integer array of token ids",
            about=str(path),
            remedy="give an .npy, or an .npz with the array 'ids', or a .txt",
        )
    return arrays["ids"].astype(np.int64)
