"""MLPerf Inference's offline results on single GPUs, predicted with what ships: nothing is fitted.

Throughput is that of the best of several batches, as a submitter would choose it. ResNet-50 is the
topology in the onnx package, in int8; BERT large is in int8 at 192 tokens, since submissions leave
out padding and SQuAD's questions with their passages have about half of the 384 that are allowed.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks import measured, transformers
from benchmarks.fitting import Array
from trivium.backends.tensorrt import cost
from trivium.compiler import prepare, targets
from trivium.compiler.kernels import Kernel, kernels_of
from trivium.compiler.machines.base import Context
from trivium.compiler.types import Target

GPUS = {
    "NVIDIA H100-SXM-80GB": "nvidia-h100-sxm",
    "NVIDIA H100-PCIe-80GB": "nvidia-h100-pcie",
    "NVIDIA H200-SXM-141GB": "nvidia-h200",
    "NVIDIA L40S": "nvidia-l40s",
    "NVIDIA L4": "nvidia-l4",
}
BATCHES = (8, 16, 32, 64, 128, 256)
TOKENS = 192
BERT = transformers.Shape(24, 1024, 16, 4096, causal=False)


def rows() -> tuple[list[str], Array, Array, float]:
    """What each row is, seconds of a sample measured and predicted, and the predictions' spread."""
    makers: dict[str, Callable[[int], Sequence[Kernel]]] = {
        "resnet50": _resnet(),
        "bert-99": lambda batch: transformers.kernels(
            BERT, cost.melts, batch=batch, queries=TOKENS, dtype="int8"
        ),
    }
    names, actual, guessed, spreads = [], [], [], []
    for (benchmark, name), values in sorted(_published().items()):
        if benchmark in makers:
            target = targets.find(name)
            names.append(f"{benchmark} on {name}")
            actual.append(1.0 / statistics.median(values))
            guessed.append(min(_seconds(makers[benchmark], target, b) / b for b in BATCHES))
            spreads.append(cost.profile_for(target).spread)
    return names, np.array(actual), np.array(guessed), float(np.mean(spreads))


def _published() -> dict[tuple[str, str], list[float]]:
    """Samples a second of one GPU, by benchmark and device."""
    found: dict[tuple[str, str], list[float]] = {}
    path = measured.folder() / "measured/mlperf_inference_v4.1/results.csv"
    with path.open(encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            wanted = (row["valid"], row["scenario"], row["division"])
            if wanted != ("VALID", "Offline", "closed") or row["accelerator"] not in GPUS:
                continue
            gpus = int(row["acc_per_node"]) * int(row["nodes"])
            key = row["benchmark"], GPUS[row["accelerator"]]
            found.setdefault(key, []).append(float(row["value"]) / gpus)
    return found


def _resnet() -> Callable[[int], Sequence[Kernel]]:
    """ResNet-50 in int8: the float topology's kernels with a quarter of its bytes."""
    import onnx

    path = Path(onnx.__file__).parent / "backend/test/data/light/light_resnet50.onnx"
    model, _ = prepare.optimize(path)
    # That file makes its weights up when it runs; they are counted as weights here.
    kernels = [
        k for k in kernels_of(model.graph, cost.melts) if "ConstantOfShape" not in k.op_types
    ]

    def scaled(kernel: Kernel, batch: int) -> Kernel:
        weights = float(sum(one.n * one.k * one.batch for one in kernel.products))
        return replace(
            kernel,
            dense={"int8": sum(kernel.dense.values()) * batch} if kernel.dense else {},
            vector={name: count * batch for name, count in kernel.vector.items()},
            weight_bytes=weights,
            read_bytes=max(kernel.read_bytes / 4.0 - weights, 1.0) * batch,
            written_bytes=kernel.written_bytes / 4.0 * batch,
            products=tuple(one._replace(m=one.m * batch) for one in kernel.products),
        )

    return lambda batch: [scaled(kernel, batch) for kernel in kernels]


def _seconds(make: Callable[[int], Sequence[Kernel]], target: Target, batch: int) -> float:
    kernels = make(batch)
    profile = cost.profile_for(target)
    assert profile.machine is not None
    held = sum(kernel.weight_bytes * kernel.times for kernel in kernels)
    held += max(kernel.activation_bytes for kernel in kernels)
    context = Context(1.0, held, {"float16": ("float16", "bfloat16")})
    times, notes = profile.machine.time(kernels, target, context)
    total = profile.call_s
    for kernel, time in zip(kernels, times, strict=True):
        assert time is not None, notes
        total += time.seconds * kernel.times
    return total
