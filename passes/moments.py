"""Statistics of activations that pruning looks at, accumulated batch by batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from trivium.compiler.errors import BadInput
from trivium.compiler.passing import decline
from trivium.passes.quantization.calibration import calibrate
from trivium.passes.quantization.observers import Stored

if TYPE_CHECKING:
    import onnx_ir as ir

    from trivium.compiler.backend import Tensors

Array = np.ndarray[Any, np.dtype[Any]]


class Power(Stored):
    """Mean square along one axis; an `Observer` that keeps one number for each place."""

    kept: ClassVar[tuple[str, ...]] = ("seen", "total")

    def __init__(self, axis: int) -> None:
        self.axis = axis
        self.seen = 0
        self.total: Array = np.zeros(())

    def update(self, values: Array) -> None:
        rows = np.moveaxis(values, self.axis, -1).reshape(-1, values.shape[self.axis])
        self.total = self.total + np.einsum("ij,ij->j", rows, rows, dtype=np.float64)
        self.seen += len(rows)

    def range(self) -> tuple[float, float]:
        raise TypeError("a power has no range")

    @property
    def mean(self) -> Array:
        return np.asarray(self.total / max(1, self.seen))


def powers(
    model: ir.Model,
    places: Sequence[tuple[ir.Value, int]],
    feeds: Iterable[Tensors] | None,
    *,
    about: str,
) -> dict[ir.Value, Array]:
    """The mean square of values along an axis of each, on representative inputs.

    Values that the data never reaches, or that hold NaN or infinity on it, are left out.

    Raises:
        BadInput: There is no data.
    """
    if feeds is None:
        raise BadInput(
            "ranking by activations needs representative inputs",
            about=about,
            remedy="give them with --calib FILE.npz, or rank by magnitude",
        )
    axes = dict(places)
    seen = calibrate(model, list(axes), feeds, lambda value: Power(axes[value]))
    found = {}
    for value, observer in seen.observers.items():
        assert isinstance(observer, Power)
        if value in seen.spoiled or not observer.seen:
            decline(value, "holds NaN or infinity, or nothing, on the calibration data")
        else:
            found[value] = observer.mean
    return found
