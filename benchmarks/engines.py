"""Engines on this CPU against their predictions: ONNX Runtime, OpenVINO, XLA, TVM on real models.

The cost models are calibrated first, as ``trivium calibrate cpu`` does it, on microbenchmarks; the
models themselves are only scored. A call's time is that of the quickest tenth of many, since what
else runs on a machine only adds to it; engines take their turns on each model.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.harness import Row
from benchmarks.workloads import minilm, shared

TITLE = "Predicted and measured on this CPU"

MODELS: dict[str, tuple[str, ...]] = {
    "cifar_resnet20": ("N=1",),
    "cifar_resnet32": ("N=1",),
    "mlperf_ic_resnet8_fp32": ("N=1",),
    "mlperf_kws_dscnn_fp32": ("N=1",),
    "mlperf_ad_autoencoder_fp32": ("N=1",),
    "mnist_cnn_cntk": (),
    "magika_v3_3": ("unk__214=1",),
    "ultraface_rfb320": (),
    "espcn_x3_float": (),
    "minilm": ("batch=1", "seq=128"),
}
BUDGET_S = float(os.environ.get("TRIVIUM_CALIBRATION_BUDGET", "180"))
CALLS_S = 1.0
ERROR_BAR = 0.15
CLOSE = 1.05
"""An engine chosen that is this close to the best one is as good a choice."""


def rows() -> list[Row]:
    """Calibrate, measure, and compare."""
    from trivium.compiler import calibrate, targets

    found: dict[str, dict[str, tuple[float, float, bool]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        before = os.environ.get("TRIVIUM_CALIBRATIONS")
        if before is None:
            os.environ["TRIVIUM_CALIBRATIONS"] = folder
            target = targets.find("cpu")
            calibrate.write(calibrate.default_file(target), calibrate.measure(target, BUDGET_S))
        try:
            for name, shape in MODELS.items():
                path = minilm(Path(folder)) if name == "minilm" else shared(f"models/{name}.onnx")
                if path is not None:
                    found[name] = _alone(name, path, shape)
        finally:
            if before is None:
                del os.environ["TRIVIUM_CALIBRATIONS"]
    return [*_errors(found), _choice(found)]


def _alone(name: str, path: Path, shape: tuple[str, ...]) -> dict[str, tuple[float, float, bool]]:
    """`_model` in a process of its own: what engines leave behind of other models slows them."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_model, name, path, shape).result()


def _model(name: str, path: Path, shape: tuple[str, ...]) -> dict[str, tuple[float, float, bool]]:
    """Engine -> seconds predicted, measured, and whether the interval holds it."""
    import trivium
    from trivium.compiler import calibrate, targets
    from trivium.compiler.errors import TriviumError
    from trivium.compiler.verify import carried_feeds

    runs: dict[str, tuple[Any, Any, dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for engine in targets.find("cpu").backends:
            try:
                artifact = trivium.compile(
                    path,
                    "cpu",
                    backend=engine,
                    shape=shape,
                    out=Path(folder) / engine,
                    use_cache=False,
                )
                executable = artifact.load()
            except TriviumError as error:
                print(f"{name} on {engine}: {error}")
                continue
            runs[engine] = executable, carried_feeds(artifact)[0], artifact.manifest["estimate"]
        times: dict[str, list[float]] = {engine: [] for engine in runs}
        for _ in range(3):
            for engine, (executable, feed, _estimate) in runs.items():
                call = _calling(executable, feed)
                times[engine].append(calibrate.quick_decile(call, CALLS_S / 3))
    result = {}
    for engine, (_executable, _feed, estimate) in runs.items():
        measured = min(times[engine])
        inside = estimate["lo"] <= measured <= estimate["hi"]
        result[engine] = (estimate["seconds"], measured, inside)
        print(f"{name:28} {engine:12} {measured * 1e6:9.1f} us, "
              f"predicted {estimate['seconds'] * 1e6:9.1f}")  # fmt: skip
    return result


def _calling(executable: Any, feed: Any) -> Any:
    return lambda: executable.run(feed)


def _errors(found: dict[str, dict[str, tuple[float, float, bool]]]) -> list[Row]:
    """A row for each engine: the mean error of its predictions."""
    engines = {engine: None for one in found.values() for engine in one}
    table = []
    for engine in engines:
        mine = {name: one[engine] for name, one in found.items() if engine in one}
        errors = [abs(predicted / measured - 1.0) for predicted, measured, _ in mine.values()]
        inside = sum(held for _, _, held in mine.values())
        table.append(
            Row(
                f"{engine} on {len(mine)} models, calibrated on microbenchmarks",
                f"mean error {statistics.mean(errors):.0%}",
                f"median {statistics.median(errors):.0%}, worst {max(errors):.0%}",
                f"{inside} of {len(mine)} within the 80% interval",
                f"mean at most {ERROR_BAR:.0%}",
                statistics.mean(errors) <= ERROR_BAR,
            )
        )
    return table


def _choice(found: dict[str, dict[str, tuple[float, float, bool]]]) -> Row:
    regrets = {}
    for name, one in found.items():
        chosen = min(one, key=lambda engine: one[engine][0])
        regrets[name] = one[chosen][1] / min(measured for _, measured, _ in one.values())
    good = sum(regret <= CLOSE for regret in regrets.values())
    worst = max(regrets, key=lambda name: regrets[name])
    return Row(
        "the engine of the least predicted time",
        f"the best, or within {CLOSE - 1:.0%} of it, for {good} of {len(regrets)} models",
        f"worst: {worst}, {regrets[worst]:.2f} times the best",
        f"mean regret {statistics.mean(regrets.values()) - 1:.0%}",
        "9 of 10",
        good >= 0.9 * len(regrets),
    )
