"""The trained digits networks: what they score, and that they are what the builders build."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from trivium.compiler import model as models
from trivium.models import digits
from trivium.models.train_digits import accuracy


@pytest.mark.parametrize(("network", "at_least"), [(digits.mlp, 0.965), (digits.cnn, 0.98)])
def test_accuracy_on_the_test_split(network: Callable[[], Path], at_least: float) -> None:
    pytest.importorskip("sklearn")
    x, y = digits.samples()
    assert len(x) == len(y) == 450
    assert accuracy(network(), x, y) >= at_least


@pytest.mark.parametrize("network", [digits.mlp, digits.cnn])
def test_files_are_small_sound_and_in_normal_form(network: Callable[[], Path]) -> None:
    path = network()
    assert path.stat().st_size < 64 << 10
    onnx.checker.check_model(str(path), full_check=True)
    model = models.load(path)
    assert model.opset_imports[""] == models.OPSET
    (image,), (logits,) = models.signature(model)
    assert (image.name, image.shape) == ("image", ("batch", 1, 8, 8))
    assert logits.shape == ("batch", 10)
