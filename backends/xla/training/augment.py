"""Named changes of a batch that leave its meaning alone: more samples than there are.

Images are found by their form: float inputs of rank 4, channels (at most 4 of them) in axis 1 or
last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from trivium.backends.xla.training.data import LABELS
from trivium.compiler.errors import BadInput

Array = np.ndarray[Any, np.dtype[Any]]
Batch = dict[str, Array]


def flip(rng: np.random.Generator, image: Array, spatial: tuple[int, int]) -> Array:
    """Mirror every other image, left to right."""
    chosen = rng.random(len(image)) < 0.5
    return np.where(chosen[:, None, None, None], np.flip(image, spatial[1]), image)


def shift(rng: np.random.Generator, image: Array, spatial: tuple[int, int]) -> Array:
    """Move each image by up to an eighth of its size; its edge is repeated."""
    moved = image.copy()
    reach = [max(1, image.shape[axis] // 8) for axis in spatial]
    for row in range(len(image)):
        for axis, far in zip(spatial, reach, strict=True):
            size = image.shape[axis]
            places = np.clip(np.arange(size) + rng.integers(-far, far + 1), 0, size - 1)
            moved[row] = np.take(moved[row], places, axis=axis - 1)
    return moved


def mix(rng: np.random.Generator, image: Array, spatial: tuple[int, int]) -> Array:
    """Blend each image with another (mixup); labels would not fit any more, a teacher's do."""
    share = rng.beta(0.5, 0.5, (len(image), 1, 1, 1)).astype(image.dtype)
    return np.asarray(share * image + (1 - share) * image[rng.permutation(len(image))])


def paste(rng: np.random.Generator, image: Array, spatial: tuple[int, int]) -> Array:
    """Put a rectangle of another image into each (CutMix); for a teacher, as ``mix``."""
    made, other = image.copy(), image[rng.permutation(len(image))]
    for row in range(len(image)):
        where = [slice(None)] * 3
        for axis in spatial:
            low, high = sorted(int(end) for end in rng.integers(0, image.shape[axis] + 1, 2))
            where[axis - 1] = slice(low, high)
        made[row][tuple(where)] = other[row][tuple(where)]
    return made


Change = Callable[[np.random.Generator, Array, tuple[int, int]], Array]
NAMED: dict[str, Change] = {"flip": flip, "shift": shift, "mix": mix, "paste": paste}
NEEDS_TEACHER = frozenset({"mix", "paste"})


def apply(names: tuple[str, ...], rng: np.random.Generator, batch: Batch) -> Batch:
    """Change the images of a batch, in the order of the names.

    Raises:
        BadInput: There is no image among the inputs.
    """
    made = dict(batch)
    images = {n: a for n, a in batch.items() if n != LABELS and a.ndim == 4 and a.dtype.kind == "f"}
    if not images:
        raise BadInput("no input is a batch of images", about="--augment")
    for name, array in images.items():
        spatial = (2, 3) if array.shape[1] <= 4 else (1, 2)
        for change in names:
            # With `mix` and `paste`, half of the batch stays as it is.
            changed = NAMED[change](rng, array, spatial)
            if change in NEEDS_TEACHER:
                kept = rng.random((len(array), 1, 1, 1)) < 0.5
                changed = np.where(kept, array, changed)
            array = changed
        made[name] = array.astype(batch[name].dtype)
    return made


def check(names: tuple[str, ...], *, labelled: bool) -> None:
    """Refuse unknown names, and blends where labels are to be learned.

    Raises:
        BadInput: As it says.
    """
    for name in names:
        if name not in NAMED:
            known = ", ".join(NAMED)
            raise BadInput(f"{name!r} is not known", about="--augment", remedy=f"known: {known}")
        if labelled and name in NEEDS_TEACHER:
            raise BadInput(
                f"{name} blends samples, and labels do not blend",
                about="--augment",
                remedy="leave the labels out to learn from the teacher alone",
            )
