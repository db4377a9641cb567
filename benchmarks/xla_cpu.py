"""XLA on this CPU against ONNX Runtime: process CPU time of one call, both pinned to one core with
one thread each, calls in turn, in one process for each model. GFLOP/s are XLA's own count of the
program's operations over its time. The mean is of the models above it; what is below it is there
for its depthwise convolutions."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.harness import Row, Samples, ratio, seconds
from benchmarks.workloads import light, minilm, shared

TITLE = "XLA on the CPU"

MODELS = {
    "cifar_resnet20": ["N=1"],
    "cifar_resnet32": ["N=1"],
    "magika_v3_3": ["bytes=1x2048"],
    "light_resnet50": [],
    "llm-shakespeare": ["batch=1", "seq=64"],
    "minilm": ["batch=1", "seq=128"],
}
DEPTHWISE = {"mlperf_kws_dscnn_fp32": ["N=1"], "ultraface_rfb320": []}
CALLS = 30


def rows() -> list[Row]:
    found, ratios = [], []
    with tempfile.TemporaryDirectory() as folder:
        for name, shape in MODELS.items():
            if (measured := _row(name, shape, Path(folder))) is not None:
                found.append(measured[0])
                ratios.append(measured[1])
        if ratios:
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            found.append(Row("geometric mean", "", "", f"{mean:.2f}", "at most 1.0", mean <= 1.0))
        for name, shape in DEPTHWISE.items():
            if (measured := _row(name, shape, Path(folder))) is not None:
                found.append(measured[0])
    return found


def _row(name: str, shape: list[str], folder: Path) -> tuple[Row, float] | None:
    """One model's line and its ratio; None where the model is absent."""
    source = _source(name, folder)
    if source is None:
        return None
    ours, peer, flops = _measure(source, shape, folder / name)
    middle, text = ratio(ours.seconds, peer.seconds)
    rate = f", {flops / ours.median / 1e9:.0f} GFLOP/s" if flops else ""
    what = f"{name} {' '.join(shape)}".strip()
    return Row(what, seconds(ours) + rate, f"ONNX Runtime {seconds(peer)}", text), middle


def _source(name: str, folder: Path) -> Path | None:
    if name == "minilm":
        return minilm(folder)
    if name.startswith("light_"):
        return light(name, folder)
    return shared(name if name == "llm-shakespeare" else f"models/{name}.onnx")


def _measure(source: Path, shape: list[str], folder: Path) -> tuple[Samples, Samples, float | None]:
    command = [sys.executable, "-m", "benchmarks.xla_cpu", str(source), str(folder), *shape]
    # Threads are decided when a library is loaded: a process of its own, told beforehand. What the
    # process is pinned to says the rest: both engines start no more threads than it may use.
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=environment
    ).stdout
    first, second, flops = json.loads(done.splitlines()[-1])
    return Samples(first), Samples(second), flops


def _child(source: str, folder: str, shape: list[str]) -> None:
    import time

    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    import trivium
    from trivium.compiler.verify import carried_feeds

    executables = []
    for backend in ("xla", "onnxruntime"):
        artifact = trivium.compile(
            source, "cpu", backend=backend, shape=shape, out=f"{folder}-{backend}", use_cache=False
        )
        executables.append(artifact.load())
        if backend == "xla":
            flops = artifact.manifest["details"]["xla"]["programs"]["main"]["compiler_flops"]
    feed = carried_feeds(artifact)[0]
    times: tuple[list[float], list[float]] = ([], [])
    for executable in executables:
        for _ in range(3):
            executable.run(feed)
    for _ in range(CALLS):
        for executable, kept in zip(executables, times, strict=True):
            started = time.process_time()
            executable.run(feed)
            kept.append(time.process_time() - started)
    print(json.dumps([*times, flops]))


if __name__ == "__main__":
    _child(sys.argv[1], sys.argv[2], sys.argv[3:])
