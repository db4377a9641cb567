"""Calibration: in segments as in one, over any kind of data, and on from where it was killed."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from tests.passes.test_quantize_static import digits_cnn, feeds
from trivium.compiler import model as models
from trivium.compiler import recipe, samples
from trivium.compiler.errors import BadInput
from trivium.compiler.feeds import read
from trivium.compiler.types import Workload
from trivium.passes.quantization import calibration, walk
from trivium.passes.quantization.calibration import calibrate
from trivium.passes.quantization.observers import OBSERVERS, Histogram, Observer

Ranges = dict[str, tuple[float, float]]


def floats(made: ir.Model) -> list[ir.Value]:
    """Every float tensor of the main graph that is computed or fed."""
    inside = (value for node in made.graph for value in node.outputs)
    everything = itertools.chain(made.graph.inputs, inside)
    return [value for value in everything if value.dtype == ir.DataType.FLOAT and value.name]


def ranges(made: ir.Model, data: Any, **options: Any) -> Ranges:
    seen = calibrate(made, floats(made), data, lambda value: OBSERVERS["minmax"](256), **options)
    return {value.name or "": one.range() for value, one in seen.observers.items()}


def normalized(path: Path) -> ir.Model:
    made = models.load(path)
    recipe.run(recipe.read("normalize"), made)
    return made


@pytest.mark.parametrize(
    ("name", "size"),
    [("cifar_resnet20", 8), ("gpt2_tiny_past", 4), ("silero_vad_16k_op15", 512)],
)
def test_segments_show_what_the_whole_shows(
    name: str, size: int, shared_data: Callable[[str], Path]
) -> None:
    made = normalized(shared_data(f"models/{name}.onnx"))
    data = samples.seeded(made, Workload(), count=2, size=size)
    assert len(walk.Walk(made, data, weights=1 << 10).segments) > 5
    whole = ranges(made, data, weights=1 << 30)
    parts = ranges(made, data, weights=1 << 10, budget=1)
    assert set(parts) == set(whole)
    for key, found in parts.items():
        assert found == pytest.approx(whole[key], rel=1e-4, abs=1e-5), key


def test_a_segment_holds_its_limit(shared_data: Callable[[str], Path]) -> None:
    made = normalized(shared_data("models/cifar_resnet20.onnx"))
    data = samples.seeded(made, Workload())
    segments = walk.Walk(made, data, weights=200_000).segments
    for segment in segments:
        weights = {v for node in segment.nodes for v in node.inputs if v and v.is_initializer()}
        assert sum(v.const_value.nbytes for v in weights if v.const_value) <= 200_000
    assert [node for segment in segments for node in segment.nodes] == list(made.graph)


def test_later_segments_see_what_was_changed() -> None:
    made, data = digits_cnn(), feeds(8, 1, 8, 8)
    before = ranges(made, data)
    walked = walk.Walk(made, data, weights=1)
    output = made.graph.outputs[0]
    for segment in walked:
        for node in segment.nodes:
            if node.op_type == "Conv":
                weight: Any = node.inputs[1]
                weight.const_value = ir.tensor(weight.const_value.numpy() * 0)
        if segment is walked.segments[-1]:
            found = [array for (array,) in walked.run(segment, [output])]
    assert np.ptp(np.concatenate(found), axis=0).max() == 0
    assert before["y"][0] != before["y"][1]


@pytest.mark.parametrize("weights", [1, 1 << 30])
@pytest.mark.parametrize("budget", [1, 1 << 30])
def test_a_file_a_folder_and_an_iterator_are_one(weights: int, budget: int, tmp_path: Path) -> None:
    made, data = digits_cnn(), feeds(8, 1, 8, 8)
    inputs = models.signature(made)[0]
    (tmp_path / "parts").mkdir()
    for index, feed in enumerate(data):
        np.savez(tmp_path / "parts" / f"{index}.npz", **feed)  # type: ignore[arg-type]  # its stubs take no arrays by name
    np.savez(tmp_path / "all.npz", x=np.concatenate([feed["x"] for feed in data]))
    expected = ranges(made, data, weights=weights, budget=budget)
    given: list[Any] = [str(tmp_path / "all.npz"), tmp_path / "parts", iter(data)]
    for one in given:
        found = ranges(made, read(one, inputs), weights=weights, budget=budget)
        assert {k: pytest.approx(v, rel=1e-5) for k, v in expected.items()} == found
    assert ranges(made, iter(data), weights=weights, budget=budget).keys() == expected.keys()
    folder = read(tmp_path / "parts", inputs)
    assert len(folder) == 4
    np.testing.assert_array_equal(folder[-1]["x"], data[-1]["x"])
    assert len(folder[1:3]) == 2


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "empty"),
        (iter([]), "empty"),
        ({"x": np.zeros((1, 1, 8, 8))}, "not feeds"),
        ([{"z": np.zeros((1, 1, 8, 8), np.float32)}], "'x' is missing"),
        ([{"x": np.zeros((1, 1, 8, 9), np.float32)}], "shape"),
        (iter([{"x": np.full((1, 1, 8, 8), np.nan, np.float32)}]), "sample 0.*NaN"),
        ([{"x": np.zeros((1, 1, 8, 8), "U1")}], "U1"),
        ([{"x": np.zeros((0, 1, 8, 8), np.float32)}], "empty"),
    ],
)
def test_data_that_does_not_fit_is_named(given: Any, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        read(given, models.signature(digits_cnn())[0])


class Fragile(Histogram):
    """Dies once, in the middle of a calibration."""

    left = 7

    def update(self, values: Any) -> None:
        Fragile.left -= 1
        if Fragile.left == 0:
            raise KeyboardInterrupt
        super().update(values)


@pytest.mark.parametrize("died_at", [3, 17, 40])
def test_what_was_killed_goes_on(
    died_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "SAVE_EVERY", 0.0)
    data, state = feeds(2, 1, 8, 8, count=6), tmp_path / "state.npz"

    def run(make: Callable[[ir.Value], Observer], **options: Any) -> Ranges:
        made = digits_cnn()
        found = calibrate(made, floats(made), data, make, weights=1, budget=1, **options)
        return {value.name or "": one.range() for value, one in found.observers.items()}

    Fragile.left = died_at
    with pytest.raises(KeyboardInterrupt):
        run(lambda value: Fragile(), state=state)
    Fragile.left = 1 << 30
    found = run(lambda value: Fragile(), state=state)
    assert (1 << 30) - Fragile.left < len(floats(digits_cnn())) * 2 * len(data)
    expected = run(lambda value: Fragile())
    assert found == {k: pytest.approx(v) for k, v in expected.items()}
    assert not list(tmp_path.iterdir())


def test_the_state_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state.npz").write_bytes(b"no archive")
    with pytest.raises(BadInput, match="remove the file"):
        ranges(digits_cnn(), feeds(2, 1, 8, 8), state=tmp_path / "state.npz")


CHILD = """
import os, sys
from pathlib import Path
import numpy as np
from tests.passes.test_calibration import digits_cnn, feeds, floats
from trivium.passes.quantization import calibration
from trivium.passes.quantization.observers import MinMax

calibration.SAVE_EVERY = 0.0
made, data = digits_cnn(), feeds(2, 1, 8, 8, count=6)
def dying():
    yield from data[:4]
    os.kill(os.getpid(), 9)
calibration.calibrate(
    made, floats(made), dying(), lambda value: MinMax(), state=Path(sys.argv[1]), budget=1
)
"""


@pytest.mark.slow
def test_a_killed_process_leaves_a_state_that_is_whole(tmp_path: Path) -> None:
    state = tmp_path / "state.npz"
    done = subprocess.run([sys.executable, "-c", CHILD, str(state)], check=False)
    assert done.returncode == -9
    assert state.is_file()
    data = feeds(2, 1, 8, 8, count=6)
    shown: list[int] = []

    def counted() -> Iterator[Any]:
        for index, feed in enumerate(data):
            shown.append(index)
            yield feed

    expected = ranges(digits_cnn(), data, budget=1)
    assert ranges(digits_cnn(), counted(), budget=1, state=state) == {
        key: pytest.approx(value) for key, value in expected.items()
    }
