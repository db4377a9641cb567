"""Published measurements as tables that formulas can be fitted to and scored on.

The folder is that of the test data (``../shared/data``, or ``TRIVIUM_TEST_DATA``); its README names
the source and the licence of each table. Nothing here changes a figure, except that rows which say
of themselves that they are not valid are left out.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fitting import Table
from trivium.compiler import targets
from trivium.compiler.types import Target

AICONFIGURATOR = {
    "a100_sxm": ("nvidia-a100-80-sxm", "trtllm/1.0.0"),
    "h100_sxm": ("nvidia-h100-sxm", "trtllm/1.2.0rc5"),
    "l40s": ("nvidia-l40s", "trtllm/1.0.0"),
}
GENERATIONS = {
    "P4": "pascal",
    "P100": "pascal",
    "V100": "volta",
    "T4": "turing",
    "A100": "ampere",
    "H100": "hopper",
    "L40S": "ada",
    "MI100": "cdna",
    "MI210": "cdna2",
}
WIDTHS = {"bfloat16": 2.0, "fp8": 1.0}


def folder() -> Path:
    """Where the test data is, if it is."""
    given = os.environ.get("TRIVIUM_TEST_DATA")
    return Path(given) if given else Path(__file__).parents[1] / "../shared/data"


def why_absent() -> str | None:
    """Why nothing can be scored here, or ``None``."""
    if not (folder() / "measured").is_dir():
        return f"the measured data is not at {folder()} (TRIVIUM_TEST_DATA names another place)"
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        return "pyarrow, which reads the tables, is not installed"
    return None


def generation(name: str) -> str:
    """The family that a device is left out with."""
    upper = name.upper().replace("NVIDIA-", "")
    found = [family for key, family in GENERATIONS.items() if key in upper.replace("_", "-")]
    if not found:
        raise KeyError(name)
    return "pascal" if "P100" in upper else found[-1]


def _parquet(path: str) -> list[dict[str, Any]]:
    from pyarrow import parquet

    rows: list[dict[str, Any]] = parquet.read_table(folder() / "measured" / path).to_pylist()
    return rows


def rows_of(path: str) -> Iterator[dict[str, str]]:
    """Those of a published CSV file."""
    with (folder() / "measured" / path).open(encoding="utf-8") as stream:
        yield from csv.DictReader(stream)


def _columns(rows: list[dict[str, Any]], **names: str) -> dict[str, Any]:
    return {ours: np.array([row[theirs] for row in rows]) for ours, theirs in names.items()}


@cache
def products(dtype: str = "bfloat16", framework: str = "sglang") -> tuple[Table, ...]:
    """GEMMs of aiconfigurator's serving libraries, one table for each device.

    Its collector runs six copies of the operands in turn, so a product finds its own in the L2
    only where six times as much fits; the result's buffer is the same every time.
    """
    found = []
    for device, (name, trtllm) in AICONFIGURATOR.items():
        version = "sglang/0.5.10" if framework == "sglang" else trtllm
        rows = _parquet(f"aiconfigurator/{device}/gemm/{version}/gemm_perf.parquet")
        rows = [row for row in rows if row["gemm_dtype"] == dtype and row["m"] > 0]
        if not rows:
            continue
        columns = _columns(rows, m="m", n="n", k="k")
        columns["width"] = np.full(len(rows), WIDTHS[dtype])
        columns["copies"] = np.full(len(rows), 6.0)
        columns["quantizes"] = np.full(len(rows), dtype == "fp8" and framework == "sglang")
        seconds = np.array([row["latency"] / 1e3 for row in rows])
        target = targets.find(name)
        source = f"aiconfigurator {version}, {dtype}"
        found.append(Table("product", target, generation(name), columns, seconds, source))
    return tuple(found)


@cache
def exchanges() -> tuple[Table, ...]:
    """NCCL's collectives; sizes are elements in the tables and bytes here."""
    found = []
    names = {"alltoall": "all_to_all"}
    for device, (name, _) in AICONFIGURATOR.items():
        rows = _parquet(f"aiconfigurator/{device}/comm/nccl/2.27.3/nccl_perf.parquet")
        columns = _columns(rows, chips="num_gpus")
        columns["operation"] = np.array([names.get(row["op_name"], row["op_name"]) for row in rows])
        widths = np.array([{"half": 2.0, "int8": 1.0}[row["nccl_dtype"]] for row in rows])
        columns["size"] = widths * [row["message_size"] for row in rows]
        seconds = np.array([row["latency"] / 1e3 for row in rows])
        target = targets.find(name)
        source = "aiconfigurator, NCCL 2.27"
        found.append(Table("collective", target, generation(name), columns, seconds, source))
    return tuple(found)


@cache
def attentions(phase: str) -> tuple[Table, ...]:
    """``context`` (causal prefill) or ``generation`` (one token against a paged cache)."""
    found = []
    for device, (name, _) in AICONFIGURATOR.items():
        path = f"aiconfigurator/{device}/attention/sglang/0.5.10/{phase}_attention_perf.parquet"
        rows = [
            row
            for row in _parquet(path)
            if row["attn_dtype"] == row["kv_cache_dtype"] == "bfloat16"
            and not row.get("window_size")
        ]
        columns = _columns(rows, batch="batch_size", queries="isl", heads="num_heads")
        columns |= _columns(rows, kv_heads="num_key_value_heads", head="head_dim")
        past = np.array([row["step"] for row in rows])
        columns["keys"] = columns["queries"] + past
        seconds = np.array([row["latency"] / 1e3 for row in rows])
        target = targets.find(name)
        source = f"aiconfigurator, flash attention, {phase}"
        found.append(Table(phase, target, generation(name), columns, seconds, source))
    return tuple(found)


# --- NeuSight: float32 kernels of PyTorch --------------------------------------------------------


@cache
def neusight_target(device: str) -> Target:
    """A device of NeuSight's by its own description."""
    file = folder() / f"measured/neusight/device_configs/{device.replace(' ', '_')}.json"
    figures = json.loads(file.read_text())
    float32 = figures.get("SingleFLOPs", figures.get("SingleFLOPsMM", 0)) * 1e9
    return Target(
        name=device.replace(" ", "-").lower(),
        family="gpu",
        backends=("xla",),
        peak_ops={"float32": float32},
        memory_bytes=figures["Dev_Mem"] * 1e9,
        memory_bytes_per_s=figures["Mem_Bw"] * 1e9,
        on_chip_bytes=figures["L2Cache"] * 2.0**20,
        on_chip_parts=2 if "A100" in device or "H100" in device else 1,
        clock_hz=figures["Freq"] * 1e6,
        units=figures["Num_Sm"],
    )


def _neusight(files: tuple[str, ...], kind: str, names: dict[str, str]) -> tuple[Table, ...]:
    rows: dict[str, list[dict[str, str]]] = {}
    for file in files:
        for row in rows_of(f"neusight/{file}.csv"):
            rows.setdefault(row["Device"], []).append(row)
    found = []
    for device, own in sorted(rows.items()):
        columns: dict[str, Any] = {
            ours: np.array([float(row[theirs]) for row in own]) for ours, theirs in names.items()
        }
        columns["operator"] = np.array([row["OPName"].lower() for row in own])
        seconds = np.array([float(row["Latency"]) / 1e3 for row in own])
        target = neusight_target(device)
        source = "NeuSight, PyTorch 2.1, float32"
        found.append(Table(kind, target, generation(device), columns, seconds, source))
    return tuple(found)


@cache
def float_products() -> tuple[Table, ...]:
    """Linear layers and batched products."""
    names = {"batch": "B", "m": "M", "n": "N", "k": "K"}
    return _neusight(("test/linear", "test/bmm"), "product_float32", names)


@cache
def rows_kernels() -> tuple[Table, ...]:
    """Elementwise, softmax and layer normalization over [B, H]."""
    files = tuple(
        f"{split}/{kind}" for split in ("train", "test") for kind in ("elem", "ln", "softmax")
    )
    amd = tuple(f"train/amd_{kind}" for kind in ("elem", "ln", "softmax"))
    return _neusight((*files, *amd), "memory", {"rows": "B", "columns": "H"})
