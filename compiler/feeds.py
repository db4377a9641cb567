"""Representative inputs as users give them: an ``.npz``, a folder of them, a list, an iterator.

Whatever it was, passes get a sequence of checked feeds that can be read again and again. A folder's
files are read one at a time, and what an iterator gives is put into such a folder first, so that
data larger than the memory is no problem.
"""

from __future__ import annotations

import os
import tempfile
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from trivium.compiler import files, samples
from trivium.compiler.errors import BadInput
from trivium.compiler.types import TensorInfo

if TYPE_CHECKING:
    from trivium.compiler.backend import Tensors

ABOUT = "the calibration data"


def read(
    given: str | os.PathLike[str] | Iterable[Tensors], inputs: Sequence[TensorInfo]
) -> Sequence[Tensors]:
    """Return checked feeds.

    Args:
        given: An ``.npz``, a folder of them (taken by name), or feeds.
        inputs: Of the model.

    Raises:
        BadInput: Wrong names, dtypes or shapes, NaN, or nothing at all; the message says where.
    """
    if isinstance(given, FeedFolder):
        return given
    if isinstance(given, (str, os.PathLike)):
        path = Path(given)
        return FeedFolder(path, inputs) if files.is_folder(path) else samples.read_npz(path, inputs)
    if isinstance(given, Mapping) or not isinstance(given, Iterable):
        raise BadInput(
            f"a {type(given).__name__}, not feeds",
            about=ABOUT,
            remedy="give a list (or an iterator) of dicts: name of an input -> array",
        )
    checked = (_checked(feed, inputs, index) for index, feed in enumerate(given))
    found = list(checked) if isinstance(given, Sequence) else _stored(checked, inputs)
    if not len(found):
        raise BadInput("it is empty", about=ABOUT, remedy="give at least one sample")
    return found


def _checked(feed: Any, inputs: Sequence[TensorInfo], index: int) -> dict[str, Any]:
    import numpy as np

    about = f"{ABOUT}, sample {index}"
    ready = samples.conform_feeds(feed, inputs, about=about)
    for name, array in ready.items():
        if array.size == 0:
            raise BadInput(f"the array {name!r} is empty", about=about)
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise BadInput(f"the array {name!r} holds NaN or infinity", about=about)
    return ready


def _stored(feeds: Iterable[dict[str, Any]], inputs: Sequence[TensorInfo]) -> Sequence[Tensors]:
    import numpy as np

    folder = tempfile.TemporaryDirectory(prefix="trivium-feeds-")
    empty = True
    for index, feed in enumerate(feeds):
        np.savez(Path(folder.name) / f"{index:08}.npz", **feed)
        empty = False
    return [] if empty else FeedFolder(Path(folder.name), inputs, owner=folder)


class FeedFolder(Sequence["Tensors"]):
    """The feeds of a folder of ``.npz`` files, of which one is in memory at a time.

    Each file is what `samples.read_npz` takes. All are read once to begin with, so that a
    bad one is named before anything is computed.
    """

    def __init__(self, path: Path, inputs: Sequence[TensorInfo], owner: object = None) -> None:
        self._inputs, self._owner = inputs, owner
        self._files = sorted(path.glob("*.npz"))
        if not self._files:
            raise BadInput("holds no .npz file", about=str(path), remedy="give an .npz or a folder")
        counts = [len(samples.read_npz(file, inputs)) for file in self._files]
        self._ends = list(accumulate(counts))
        self._latest: tuple[int, list[dict[str, Any]]] = -1, []

    def __len__(self) -> int:
        return self._ends[-1]

    @overload
    def __getitem__(self, index: int) -> Tensors: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensors]: ...

    def __getitem__(self, index: int | slice) -> Tensors | Sequence[Tensors]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(index)
        at = bisect_right(self._ends, place)
        if self._latest[0] != at:
            self._latest = at, samples.read_npz(self._files[at], self._inputs)
        return self._latest[1][place - (self._ends[at - 1] if at else 0)]

    def __iter__(self) -> Iterator[Tensors]:
        for file in self._files:
            yield from samples.read_npz(file, self._inputs)
