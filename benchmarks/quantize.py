"""Static int8 of MiniLM on real sentences, end to end (read, calibrate, quantize, write), against
``onnxruntime.quantization.quantize_static`` on the same model and samples."""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks import workloads
from benchmarks.harness import Row, Samples, in_turn, mebibytes, python, ratio, run_command, seconds

TITLE = "Static int8 of MiniLM"

SAMPLES, TOKENS = 32, 128

_OURS = """
import sys
from trivium.compiler import prepare, model, samples
source, feeds, out, recipe = sys.argv[1:]
made = model.load(source)
calibration = samples.read_npz(feeds, model.signature(made)[0])
model.save(prepare.optimize(made, recipe, calibration=calibration)[0], out, external=True)
"""

_PEER = """
import sys
import numpy as np
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, quantize_static
source, feeds, out, method = sys.argv[1:]

class Reader(CalibrationDataReader):
    def __init__(self):
        arrays = dict(np.load(feeds))
        count = len(next(iter(arrays.values())))
        self.feeds = iter([{k: v[i : i + 1] for k, v in arrays.items()} for i in range(count)])

    def get_next(self):
        return next(self.feeds, None)

quantize_static(
    source, out, Reader(), per_channel=True, use_external_data_format=True,
    calibrate_method=CalibrationMethod[method],
)
"""

_AGREEMENT = """
import sys
import numpy as np
import onnxruntime as ort
source, feeds, made = sys.argv[1:]
arrays = {k: v[-8:] for k, v in np.load(feeds).items()}
options = ort.SessionOptions()
options.log_severity_level = 3
want, have = (ort.InferenceSession(p, options).run(None, arrays)[0] for p in (source, made))
print((want * have).sum() / np.linalg.norm(want) / np.linalg.norm(have))
"""

METHODS = (("int8-minmax", "MinMax"), ("int8-entropy", "Entropy"))


def rows() -> list[Row]:
    made = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = workloads.minilm(folder)
        feeds = workloads.sentences(folder, SAMPLES, TOKENS)
        if source is None or feeds is None:
            return []
        for recipe, method in METHODS:
            made += _compare(source, feeds, folder, recipe, method)
    return made


def _compare(source: Path, feeds: Path, folder: Path, recipe: str, method: str) -> list[Row]:
    a, b = str(folder / "ours.onnx"), str(folder / "peer.onnx")

    def ours(samples: Samples) -> None:
        run_command(python(_OURS, str(source), str(feeds), a, recipe), samples)

    def peer(samples: Samples) -> None:
        run_command(python(_PEER, str(source), str(feeds), b, method), samples)

    first, second = in_turn(ours, peer, runs=3)
    time, time_words = ratio(first.seconds, second.seconds)
    memory, memory_words = ratio(first.peak_bytes, second.peak_bytes)
    agreement = [_agreement(source, feeds, made) for made in (a, b)]
    return [
        Row(
            f"{recipe}: seconds", seconds(first), f"quantize_static, {method}: {seconds(second)}",
            time_words, "under 1", time < 1,
        ),
        Row(
            f"{recipe}: peak memory", mebibytes(first.peak), mebibytes(second.peak),
            memory_words, "0.5 or less", memory <= 0.5,
        ),
        Row(
            f"{recipe}: cosine with float32", f"{agreement[0]:.4f}", f"{agreement[1]:.4f}", "",
            "no lower", agreement[0] >= agreement[1],
        ),
    ]  # fmt: skip


def _agreement(source: Path, feeds: Path, made: str) -> float:
    import subprocess

    command = python(_AGREEMENT, str(source), str(feeds), made)
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout)
