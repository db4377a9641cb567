"""What is learned from: samples of a model's inputs, with or without labels, or token text.

A *sample* is what one run of the model takes at least: a row where the batch is free, a whole
batch where it is fixed. Order and split follow from the seed alone, so that a resumed run sees the
batches that it would have seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from trivium.backends.xla.training.settings import Settings
from trivium.compiler import files
from trivium.compiler.errors import BadInput
from trivium.compiler.samples import conform, numpy_dtype
from trivium.compiler.types import TensorInfo

Array = np.ndarray[Any, np.dtype[Any]]

LABELS = "y"
"""What labels are called in a file of samples."""

TEXT_SUFFIXES = (".txt", ".md")


@dataclass(frozen=True)
class Data:
    """Samples along the first axis of every array.

    Attributes:
        feeds: By input.
        labels: Or None.
        fixed_batch: Rows of one sample where the model fixes its batch, else 0.
        tokens: Whether the labels are the next tokens of text.
        about: What to call the data in an error.
    """

    feeds: Mapping[str, Array]
    labels: Array | None
    fixed_batch: int
    tokens: bool
    about: str

    @property
    def count(self) -> int:
        return len(next(iter(self.feeds.values())))

    def take(self, rows: Any) -> dict[str, Array]:
        """Some samples: inputs by name, and labels."""
        taken = {name: array[rows] for name, array in self.feeds.items()}
        if self.labels is not None:
            taken[LABELS] = self.labels[rows]
        return taken

    def split(self, share: float, seed: int) -> tuple[Data, Data]:
        """Hold a share out; with nothing to hold out, the whole serves both.

        Text is cut once, so that no held-out window overlaps one that is learned from.
        """
        held = min(max(1, round(share * self.count)) if share else 0, self.count - 1)
        if not held:
            return self, self
        order = np.arange(self.count)
        if not self.tokens:
            np.random.default_rng([seed, 1]).shuffle(order)
        return self._some(np.sort(order[:-held])), self._some(np.sort(order[-held:]))

    def _some(self, rows: Array) -> Data:
        labels = None if self.labels is None else self.labels[rows]
        feeds = {name: array[rows] for name, array in self.feeds.items()}
        return Data(feeds, labels, self.fixed_batch, self.tokens, self.about)

    def batch(self, step: int, size: int, seed: int) -> dict[str, Array]:
        """The samples of one update: every epoch in an order of its own."""
        size = min(size, self.count)
        each = self.count // size
        epoch, place = divmod(step, each)
        order = np.random.default_rng([seed, 2, epoch]).permutation(self.count)
        return self.take(order[place * size : (place + 1) * size])

    def calibration(self, size: int = 32, most: int = 256) -> list[dict[str, Array]]:
        """Feeds for the passes of a recipe that calibrate."""
        if self.fixed_batch:
            return [{k: v[i] for k, v in self.feeds.items()} for i in range(min(self.count, most))]
        starts = range(0, min(self.count, most), size)
        return [{k: v[i : i + size] for k, v in self.feeds.items()} for i in starts]

    @cached_property
    def digest(self) -> str:
        total = hashlib.sha256()
        for name, array in sorted({**self.feeds, LABELS: self.labels}.items()):
            total.update(name.encode())
            if array is not None:
                total.update(np.ascontiguousarray(array).tobytes())
        return total.hexdigest()


def read(
    given: Any, inputs: Sequence[TensorInfo], settings: Settings, *, tokenizer: Path | None = None
) -> Data:
    """Read training data.

    Args:
        given: An ``.npz`` with arrays named as the inputs (``x`` for a single one) and perhaps
            ``y``; an ``.npy`` of token ids, or an ``.npz`` with ``ids``; a ``.txt`` for a
            checkpoint folder with a tokenizer; or such arrays in a mapping.
        tokenizer: The checkpoint's ``tokenizer.json``.

    Raises:
        BadInput: It is none of these, or does not fit the model.
    """
    arrays, about = _arrays(given, tokenizer)
    if "ids" in arrays and all(info.name != "ids" for info in inputs):
        return _windows(arrays["ids"], inputs, settings, about)
    labels = arrays.pop(LABELS, None) if all(i.name != LABELS for i in inputs) else None
    if len(inputs) == 1 and inputs[0].name not in arrays and "x" in arrays:
        arrays[inputs[0].name] = arrays.pop("x")
    missing = [info.name for info in inputs if info.name not in arrays]
    if missing:
        raise BadInput(
            f"has no array for the input {missing[0]!r}",
            about=about,
            remedy=f"it holds: {', '.join(arrays) or 'nothing'}",
        )
    feeds = {i.name: conform(arrays[i.name], i, about=about, batched=True) for i in inputs}
    return _checked(feeds, labels, inputs, about)


def _checked(
    feeds: dict[str, Array], labels: Any, inputs: Sequence[TensorInfo], about: str
) -> Data:
    for name, array in feeds.items():
        if array.ndim == 0:
            raise BadInput(
                f"the input {name!r} is a scalar", about=about, remedy="samples lie along an axis"
            )
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise BadInput(f"the array {name!r} holds NaN or infinity", about=about)
    counts = {name: len(array) for name, array in feeds.items()}
    if labels is not None:
        labels = np.asarray(labels)
        if labels.dtype.kind == "f" and not np.isfinite(labels).all():
            raise BadInput(f"the array {LABELS!r} holds NaN or infinity", about=about)
        counts[LABELS] = len(labels)
    if len(set(counts.values())) > 1:
        shown = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise BadInput(f"arrays of different lengths: {shown}", about=about)
    count = next(iter(counts.values()))
    leading = {info.shape[0] for info in inputs}
    fixed = next(iter(leading)) if len(leading) == 1 else 0
    if isinstance(fixed, int) and fixed:
        feeds = {k: v.reshape(count // fixed, fixed, *v.shape[1:]) for k, v in feeds.items()}
        if labels is not None:
            labels = labels.reshape(count // fixed, fixed, *labels.shape[1:])
        count //= fixed
    if not count:
        raise BadInput("holds no samples", about=about)
    return Data(feeds, labels, fixed if isinstance(fixed, int) else 0, False, about)


def _arrays(given: Any, tokenizer: Path | None) -> tuple[dict[str, Any], str]:
    if isinstance(given, Mapping):
        return {name: np.asarray(array) for name, array in given.items()}, "data"
    if isinstance(given, np.ndarray):
        return {"ids": given}, "data"
    path = Path(given)
    if path.suffix in TEXT_SUFFIXES:
        return {"ids": _tokens(path, tokenizer)}, str(path)
    files.require_file(path)
    try:
        loaded = np.load(path, allow_pickle=False)
        arrays = {"ids": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
    except Exception as error:  # zipfile, zlib and numpy each raise their own kinds
        raise BadInput(
            "not a readable .npz, .npy or .txt file", about=str(path), remedy=f"({error})"
        ) from error
    return arrays, str(path)


def _tokens(path: Path, tokenizer: Path | None) -> Array:
    if tokenizer is None or not tokenizer.is_file():
        raise BadInput(
            "text needs a tokenizer, and the model has none beside it",
            about=str(path),
            remedy="give a checkpoint folder as MODEL, or token ids as an .npy",
        )
    from tokenizers import Tokenizer

    files.require_file(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadInput("not UTF-8 text", about=str(path)) from error
    made = Tokenizer.from_file(str(tokenizer))
    return np.array(made.encode(text, add_special_tokens=False).ids, np.int64)


def _windows(ids: Any, inputs: Sequence[TensorInfo], settings: Settings, about: str) -> Data:
    """Cut a text into windows whose labels are the tokens that come next."""
    tokens = next((i for i in inputs if i.dtype in ("int64", "int32") and len(i.shape) == 2), None)
    if tokens is None:
        raise BadInput("the model has no [batch, sequence] input of token ids", about=about)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise BadInput("token ids are a one-dimensional array of integers", about=about)
    window = tokens.shape[1] if isinstance(tokens.shape[1], int) else settings.window
    count = (len(ids) - 1) // window
    if count < 1:
        raise BadInput(f"{len(ids)} tokens make no window of {window} and one more", about=about)
    rows = ids[: count * window].reshape(count, window)
    labels = ids[1 : count * window + 1].reshape(count, window).astype(np.int64)
    feeds = {}
    for info in inputs:
        if info is tokens:
            value = rows
        elif "position" in info.name:
            value = np.broadcast_to(np.arange(window), rows.shape)
        elif "mask" in info.name or "type" in info.name:
            value = np.full(rows.shape, "mask" in info.name)
        else:
            raise BadInput(
                f"text does not say what the input {info.name!r} is",
                about=about,
                remedy="give an .npz with an array for each input",
            )
        feeds[info.name] = value.astype(numpy_dtype(info.dtype))
    made = _checked(feeds, labels, inputs, about)
    return Data(made.feeds, made.labels, made.fixed_batch, True, about)
