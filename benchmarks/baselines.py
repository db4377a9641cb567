"""What the cost models have to beat: the raw roofline, and one with three coefficients."""

from __future__ import annotations

import numpy as np

from benchmarks.fitting import Array, Coefficients, Formula, Table
from benchmarks.formulas import READS_AND_WRITES, WIDTH_NAMES


def demand(table: Table) -> tuple[Array, Array, float]:
    """Operations and bytes of every row, and the device's peak for them."""
    columns, target = table.columns, table.target
    if table.kind in ("context", "generation"):
        pairs = columns["batch"] * columns["heads"] * columns["queries"] * columns["keys"]
        share = 0.5 if table.kind == "context" else 1.0
        own = 2.0 * columns["batch"] * columns["heads"] * columns["queries"]
        cached = 2.0 * columns["batch"] * columns["kv_heads"] * columns["keys"]
        moved = 2.0 * (own + cached) * columns["head"]
        return 4.0 * share * pairs * columns["head"], moved, target.peak_ops["bfloat16"]
    if table.kind == "memory":
        tensors = np.array([READS_AND_WRITES.get(str(one), 2.0) for one in columns["operator"]])
        elements = columns["rows"] * columns["columns"]
        return elements, 4.0 * elements * tensors, target.peak_ops["float32"]
    m, n, k = (columns[name] * 1.0 for name in "mnk")
    batch = columns.get("batch", np.ones(len(table)))
    narrow = table.kind == "product"
    width = columns["width"] if narrow else 4.0
    name = WIDTH_NAMES[float(columns["width"][0])] if narrow else "float32"
    result = 2.0 if narrow else 4.0
    moved = batch * (width * (m * k + n * k) + result * m * n)
    return 2.0 * batch * m * n * k, moved, target.peak_ops[name]


def raw(table: Table) -> Array:
    """The larger of operations over peak and bytes over bandwidth."""
    if table.kind == "collective":
        steps = np.where(table.columns["operation"] == "all_reduce", 2.0, 1.0)
        chips = table.columns["chips"]
        rate = table.target.link_bytes_per_s or np.nan
        return np.asarray(steps * (chips - 1) / chips * table.columns["size"] / rate)
    operations, moved, peak = demand(table)
    bandwidth = table.target.memory_bytes_per_s or np.nan
    return np.asarray(np.maximum(operations / peak, moved / bandwidth))


def _three(table: Table, c: Coefficients) -> Array:
    if table.kind == "collective":
        return np.asarray(c["launch_s"] + raw(table) / c["memory"])
    operations, moved, peak = demand(table)
    bandwidth = table.target.memory_bytes_per_s or np.nan
    compute, memory = operations / (peak * c["compute"]), moved / (bandwidth * c["memory"])
    return np.asarray(c["launch_s"] + np.maximum(compute, memory))


THREE = Formula(
    _three,
    {"launch_s": 5e-6, "compute": 0.7, "memory": 0.8},
    {"launch_s": (1e-8, 1e-3), "compute": (0.01, 2.0), "memory": (0.01, 4.0)},
    ("launch_s", "compute", "memory"),
)
"""A launch, and a share of either rate."""
