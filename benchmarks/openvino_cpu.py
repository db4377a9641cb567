"""Artifacts of the OpenVINO backend against plain OpenVINO on the source model (float32), and its
int8 against ONNX Runtime's on the same data: process CPU time of one call, both pinned to one core,
calls in turn, in one process for each model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness import Row, Samples, ratio, seconds
from benchmarks.workloads import minilm, sentences, shared

TITLE = "OpenVINO on the CPU"

MODELS = {
    "minilm": ["batch=1", "seq=128"],
    "light_resnet50": [],
    "cifar_resnet20": ["N=1"],
    "ultraface_rfb320": [],
}
CALLS = 20


def rows() -> list[Row]:
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model, shape in MODELS.items():
            source = _source(model, folder)
            if source is None:
                continue
            what = f"{model} {' '.join(shape)}".strip()
            ours, peer = _measure("float32", source, shape, folder)
            middle, text = ratio(ours.seconds, peer.seconds)
            found.append(
                Row(what, seconds(ours), f"plain OpenVINO {seconds(peer)}", text,
                    "at most 1.05", middle <= 1.05)
            )  # fmt: skip
            if model.startswith("light_"):  # its weights are computed: nothing to quantize
                continue
            ours, peer = _measure("int8", source, shape, folder)
            middle, text = ratio(ours.seconds, peer.seconds)
            found.append(
                Row(f"{what}, int8", seconds(ours), f"ONNX Runtime, int8 {seconds(peer)}", text)
            )
    return found


def _source(name: str, folder: Path) -> Path | None:
    if name == "minilm":
        return minilm(folder)
    if name.startswith("light_"):
        import onnx

        return Path(onnx.__file__).parent / "backend" / "test" / "data" / "light" / f"{name}.onnx"
    return shared(f"models/{name}.onnx")


def _measure(what: str, source: Path, shape: list[str], folder: Path) -> tuple[Samples, Samples]:
    command = [sys.executable, "-m", "benchmarks.openvino_cpu", what, str(source), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *shape], check=True, stdout=subprocess.PIPE, text=True, env=environment
    ).stdout
    first, second = json.loads(done.splitlines()[-1])
    return Samples(first), Samples(second)


def _child(what: str, source: str, folder: str, shape: list[str]) -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    from trivium.compiler.verify import carried_feeds

    artifact = _compile(source, "openvino", what, folder, shape)
    feed = carried_feeds(artifact)[0]
    if what == "int8":
        peer = _one_thread(_compile(source, "onnxruntime", what, folder, shape))
    else:
        peer = _plain(source, feed)
    runs: list[Callable[[Any], Any]] = [artifact.load().run, peer]
    times: tuple[list[float], list[float]] = ([], [])
    for run in runs:
        for _ in range(3):
            run(feed)
    for _ in range(CALLS):
        for run, kept in zip(runs, times, strict=True):
            started = time.process_time()
            run(feed)
            kept.append(time.process_time() - started)
    print(json.dumps(times))


def _compile(source: str, backend: str, what: str, folder: str, shape: list[str]) -> Any:
    import trivium

    recipe = "int8-minmax" if what == "int8" else "none"
    feeds = None
    if what == "int8" and "batch=1" in shape:
        feeds = sentences(Path(folder), 8, 128)
    out = Path(folder) / f"{Path(source).stem}-{backend}-{what}"
    return trivium.compile(
        source, "cpu", backend=backend, recipe=recipe, shape=shape, out=out, use_cache=False,
        calibration=feeds,
    )  # fmt: skip


def _one_thread(artifact: Any) -> Callable[[Any], Any]:
    """ONNX Runtime without the threads whose waiting would count as its processor time."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(
        str(artifact.path / artifact.programs[0].file), options,
        disabled_optimizers=artifact.manifest["details"]["disabled_optimizers"],
    )  # fmt: skip
    return lambda fed: session.run(None, fed)


def _plain(source: str, feed: dict[str, Any]) -> Callable[[Any], Any]:
    """OpenVINO as its own guide has it: read, fix the shapes, compile in float32, infer."""
    import openvino

    core = openvino.Core()
    model = core.read_model(source)
    model.reshape({name: list(array.shape) for name, array in feed.items()})
    properties = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    request = core.compile_model(model, "CPU", properties).create_infer_request()
    return lambda fed: request.infer(fed, share_inputs=True)


if __name__ == "__main__":
    _child(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:])
