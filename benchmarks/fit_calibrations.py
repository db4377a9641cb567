"""Fit the coefficients in ``targets/calibrations/*.toml`` to published measurements.

    python -m benchmarks.fit_calibrations [TABLE ...]

writes a table for each device with data and one for its family; by default all of them. Rows to
fit on are drawn at random, and the spread that goes with a device's coefficients is that on rows
the fit did not see; a family's is what its devices say of one another. Only these figures go into
the project, not the data (see `benchmarks.measured`).
"""

from __future__ import annotations

import datetime
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tomli_w

from benchmarks import fitting, formulas, measured, whole
from trivium.compiler.calibration import Calibration, spread_of

FOLDER = Path(__file__).parents[1] / "targets" / "calibrations"

ROWS = 600
"""To fit on, from each device; as many again, if there are, to judge the fit."""


class Job(NamedTuple):
    """A table of the files: which formula, fitted to what."""

    formula: fitting.Formula
    tables: Callable[[], Sequence[fitting.Table]]
    what: str


def _on(fabric: str) -> list[fitting.Table]:
    from trivium.compiler.machines import collectives

    return [table for table in measured.exchanges() if collectives.fabric(table.target) == fabric]


JOBS: Mapping[str, Job] = {
    "product": Job(
        formulas.PRODUCT,
        measured.products,
        "bfloat16 GEMMs of SGLang 0.5.10 (aiconfigurator 095f58a)",
    ),
    "product_float8": Job(
        formulas.PRODUCT,
        lambda: measured.products("fp8"),
        "float8 GEMMs of SGLang 0.5.10, activations quantized (aiconfigurator 095f58a)",
    ),
    "product_float32": Job(
        formulas.FLOAT_PRODUCT,
        measured.float_products,
        "float32 linear layers and batched products of PyTorch 2.1 (NeuSight 6945927)",
    ),
    "prefill": Job(
        formulas.PREFILL,
        lambda: measured.attentions("context"),
        "causal flash attention of SGLang 0.5.10 (aiconfigurator 095f58a)",
    ),
    "decode": Job(
        formulas.DECODE,
        lambda: measured.attentions("generation"),
        "paged decode attention of SGLang 0.5.10 (aiconfigurator 095f58a)",
    ),
    "stream": Job(
        formulas.STREAM,
        measured.rows_kernels,
        "elementwise, softmax and layer normalization of PyTorch 2.1 (NeuSight 6945927)",
    ),
    "collective_nvlink": Job(
        formulas.NVLINK, lambda: _on("nvlink"), "collectives of NCCL 2.27 (aiconfigurator 095f58a)"
    ),
    "collective_pcie": Job(
        formulas.PCIE, lambda: _on("pcie"), "collectives of NCCL 2.27 (aiconfigurator 095f58a)"
    ),
}

PRIORS: Mapping[str, Mapping[str, Calibration]] = {
    "tpu": {
        "engine_xla": Calibration(
            {"first_s": 1e-4},
            0.5,
            "the call's 0.1 ms are a prior",
            "2026-11-23",
            0,
        ),
    },
    "gpu": {
        "engine_xla": Calibration(
            {"first_s": 1.3e-4, "pace": 1.2},
            0.4,
            "a prior: calls as TensorRT's; nothing of XLA was measured on a GPU",
            "2026-11-29",
            0,
        ),
        "engine_tvm": Calibration(
            {"first_s": 1.3e-4, "pace": 2.0},
            0.9,
            "a prior for untuned schedules: nothing of TVM was measured on a GPU",
            "2026-11-29",
            0,
        ),
    },
}
"""What no published measurement was found for; the wide spread says so."""

TPU_TRAINING = "measured/maxtext_tpu/train_tflops_per_chip.csv"


def run_tpu() -> Calibration:
    """The share of the peak that MaxText reached in training: the median over its models, the
    spread what generations say of one another. Bandwidth is tpu-recipes' HBM copy on a v6e."""
    import csv

    shares: dict[str, list[float]] = {}
    with (measured.folder() / TPU_TRAINING).open() as stream:
        for row in csv.DictReader(stream):
            if row["phase"] == "train" and row["mfu_pct"]:
                shares.setdefault(row["device"], []).append(float(row["mfu_pct"]) / 100.0)
    middle = {device: float(np.median(values)) for device, values in shares.items()}
    product = float(np.exp(np.mean(np.log(list(middle.values())))))
    errors = [
        float(np.log(value / middle[other]))
        for device, values in shares.items()
        for other in middle
        if other != device
        for value in values
    ]
    count = sum(map(len, shares.values()))
    # Training is not inference: the spread is that of training, doubled.
    return Calibration(
        {"product": product, "memory": 0.83, "vector": 0.02, "on_chip": 8.0},
        2.0 * spread_of(errors),
        f"{count} of MaxText's training runs on {', '.join(sorted(shares))} and an HBM copy on "
        "v6e; no inference on a TPU was measured",
        datetime.date.today().isoformat(),
        count,
    )


OUR_NAMES = {
    "nvidia-a100-80gb-pcie": "nvidia-a100-80-pcie",
    "nvidia-h100-80gb-hbm3": "nvidia-h100-sxm",
}
"""Targets of NeuSight's that are devices of ours."""


def run(name: str) -> dict[str, Calibration]:
    """Fit one table: file name -> calibration."""
    job = JOBS[name]
    halves = [table.halves(ROWS, ROWS) for table in job.tables()]
    fits = [fitting.own(job.formula, train) for train, _ in halves]
    shared = fitting.family(fits)
    today = datetime.date.today().isoformat()
    found: dict[str, Calibration] = {}
    for train, test in halves:
        # What a device may not change is its family's, so the rest is fitted beside that.
        coefficients = fitting.fit(job.formula, [train], shared, job.formula.device, pull=0.02)
        errors = fitting.residuals(job.formula, test, coefficients).tolist()
        target = OUR_NAMES.get(train.target.name, train.target.name)
        kept = {key: coefficients[key] for key in job.formula.device if key in coefficients}
        found[target] = Calibration(
            kept, spread_of(errors), f"{len(train)} {job.what}, {target}", today, len(train)
        )
    tests = [test for _, test in halves]
    names = ", ".join(sorted({train.target.name for train, _ in halves}))
    found["gpu"] = Calibration(
        shared,
        fitting.spread_between(job.formula, tests, fits),
        f"{job.what}, on {names}",
        today,
        sum(len(train) for train, _ in halves),
    )
    return found


ENGINES = {
    "engine_tensorrt": (
        whole.tensorrt_bert,
        "TensorRT's published BERT base and large on an A100, fp16 and int8 (007c347)",
    ),
    "engine_tensorrt_llm": (
        whole.tensorrt_llm,
        "TensorRT-LLM's published static batches and first tokens on A100, H100, L40S (0.5, 0.6)",
    ),
}
"""What an engine adds to the kernels, over all GPUs; fitted after the kernels."""


def run_engine(name: str) -> Calibration:
    """Fit an engine; the spread is that of groups left out in turn."""
    rows, what = ENGINES[name]
    table = whole.table(rows())
    coefficients = whole.fit(table)
    kept = {key: coefficients[key] for key in whole.ENGINES[table.source].device}
    today = datetime.date.today().isoformat()
    basis = f"{len(table)} of {what}"
    return Calibration(kept, whole.spread_between_groups(table), basis, today, len(table))


def _write(files: Mapping[str, Mapping[str, object]]) -> None:
    for file, tables in files.items():
        path = FOLDER / f"{file}.toml"
        before = tomllib.loads(path.read_text()) if path.is_file() else {}
        path.write_text(tomli_w.dumps(dict(sorted({**before, **tables}.items()))))


def main(arguments: Sequence[str]) -> int:
    """Fit, print, and write."""
    reason = measured.why_absent()
    if reason is not None:
        print(f"skipped: {reason}")
        return 0
    files: dict[str, dict[str, object]] = {}
    for name in [one for one in arguments if one != "tpu"] or [*JOBS, *ENGINES]:
        if name in ENGINES:
            _write(files)
            calibration = run_engine(name)
            files.setdefault("gpu", {})[name] = calibration.to_toml()
            print(f"{name:22} {'gpu':22} spread {calibration.spread:.3f}")
            continue
        for file, calibration in run(name).items():
            if not (FOLDER.parent / "devices" / f"{file}.toml").is_file() and file != "gpu":
                continue
            files.setdefault(file, {})[name] = calibration.to_toml()
            print(f"{name:22} {file:22} spread {calibration.spread:.3f}")
    if not arguments or "tpu" in arguments:
        files.setdefault("tpu", {})["product"] = run_tpu().to_toml()
    for file, priors in PRIORS.items():
        for name, calibration in priors.items():
            files.setdefault(file, {})[name] = calibration.to_toml()
    _write(files)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
