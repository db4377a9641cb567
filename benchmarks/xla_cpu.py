"""XLA on this CPU against ONNX Runtime: process CPU time of one call, both pinned to one core,
calls in turn, in one process for each model."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.harness import Row, Samples, ratio, seconds
from benchmarks.workloads import minilm, shared

TITLE = "XLA on the CPU"

MODELS = {
    "cifar_resnet20": ["N=1"],
    "cifar_resnet32": ["N=1"],
    "magika_v3_3": ["bytes=1x2048"],
    "light_resnet50": [],
    "llm-shakespeare": ["batch=1", "seq=64"],
    "minilm": ["batch=1", "seq=128"],
}
CALLS = 30


def rows() -> list[Row]:
    found, ratios = [], []
    with tempfile.TemporaryDirectory() as folder:
        for name, shape in MODELS.items():
            source = _source(name, Path(folder))
            if source is None:
                continue
            ours, peer = _measure(source, shape, Path(folder) / name)
            middle, text = ratio(ours.seconds, peer.seconds)
            ratios.append(middle)
            what = f"{name} {' '.join(shape)}".strip()
            found.append(Row(what, seconds(ours), f"ONNX Runtime {seconds(peer)}", text))
    if ratios:
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        found.append(Row("geometric mean", "", "", f"{mean:.2f}", "at most 1.0", mean <= 1.0))
    return found


def _source(name: str, folder: Path) -> Path | None:
    if name == "minilm":
        return minilm(folder)
    if name.startswith("light_"):
        import onnx

        return Path(onnx.__file__).parent / "backend" / "test" / "data" / "light" / f"{name}.onnx"
    return shared(name if name == "llm-shakespeare" else f"models/{name}.onnx")


def _measure(source: Path, shape: list[str], folder: Path) -> tuple[Samples, Samples]:
    command = [sys.executable, "-m", "benchmarks.xla_cpu", str(source), str(folder), *shape]
    # Threads are decided when a library is loaded: a process of its own, told beforehand.
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    }
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=environment
    ).stdout
    first, second = json.loads(done.splitlines()[-1])
    return Samples(first), Samples(second)


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
    print(json.dumps(times))


if __name__ == "__main__":
    _child(sys.argv[1], sys.argv[2], sys.argv[3:])
