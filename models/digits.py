"""Two small trained networks of our own, on scikit-learn's handwritten digits (8x8, 10 classes).

The demo compiles them, and so do the tests of backends that take only small models. The weights
in ``weights/`` were trained by ``train_digits.py`` in this folder, which makes the same files
again.

Accuracy on the 450 test digits that `samples` returns: MLP 0.969, CNN 0.982 (float32).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from trivium.compiler.errors import ToolchainMissing

if TYPE_CHECKING:
    import numpy as np

WEIGHTS = Path(__file__).parent / "weights"


def mlp() -> Path:
    """Return the ``.onnx`` file of the perceptron 64-64-32-10."""
    return WEIGHTS / "digits_mlp.onnx"


def cnn() -> Path:
    """Return the ``.onnx`` file of the network with two 3x3 convolutions (8 and 16 channels)."""
    return WEIGHTS / "digits_cnn.onnx"


def samples() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return the test split: images float32 ``[450, 1, 8, 8]`` in 0..1, and labels ``[450]``.

    Raises:
        ToolchainMissing: scikit-learn, which carries the data, is not installed.
    """
    _, _, x, y = split()
    return x, y


def split() -> tuple[Any, Any, Any, Any]:
    """Return training images and labels, test images and labels; the same for everyone."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ToolchainMissing(
            "the digits come with scikit-learn, which is not installed",
            remedy="pip install scikit-learn",
        ) from error
    import numpy as np

    digits = load_digits()
    x = (digits.images / 16.0).astype(np.float32)[:, None]
    train_x, test_x, train_y, test_y = train_test_split(
        x, digits.target, test_size=0.25, random_state=0, stratify=digits.target
    )
    return train_x, train_y, test_x, test_y
