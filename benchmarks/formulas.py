"""The formulas of `trivium.compiler.machines` on the tables of `benchmarks.measured`."""

from __future__ import annotations

import numpy as np

from benchmarks.fitting import Array, Coefficients, Formula, Table
from trivium.compiler.calibration import Calibration
from trivium.compiler.machines import collectives, gpu, gpu_attention

WIDTH_NAMES = {2.0: "bfloat16", 1.0: "float8"}


def _product(table: Table, c: Coefficients) -> Array:
    columns = table.columns
    width = float(columns["width"][0])
    chip = gpu.Chip.of(table.target, table.target.peak_ops[WIDTH_NAMES[width]])
    m, n, k = (columns[name] for name in "mnk")
    read = columns["copies"] * width * (m * k + n * k)
    seconds = gpu.product(m, n, k, chip, c, width=width, left_span=read, right_span=read).seconds
    if columns["quantizes"][0]:
        # Those rows round the activations from bfloat16 first, in a kernel of its own.
        seconds = seconds + c["launch_s"] + 3.0 * m * k / (chip.bandwidth * c["memory"])
    return seconds


def _float_product(table: Table, c: Coefficients) -> Array:
    columns = table.columns
    chip = gpu.Chip.of(table.target, table.target.peak_ops["float32"])
    m, n, k = (columns[name] for name in "mnk")
    read = 4.0 * columns["batch"] * (m * k + n * k)
    return gpu.product(
        m,
        n,
        k,
        chip,
        c,
        batch=columns["batch"],
        width=4.0,
        out_width=4.0,
        left_span=read,
        right_span=read,
    ).seconds


def _exchange(table: Table, c: Coefficients) -> Array:
    calibration = Calibration(c)
    columns = table.columns
    found = (
        collectives.predict(operation, size, int(chips), table.target, calibration)
        for operation, size, chips in zip(
            columns["operation"], columns["size"], columns["chips"], strict=True
        )
    )
    return np.array([one.seconds for one in found if one is not None])


PRODUCT = Formula(_product, gpu.PRODUCT_START, gpu.PRODUCT_BOUNDS, gpu.PRODUCT_DEVICE)
FLOAT_PRODUCT = Formula(_float_product, gpu.PRODUCT_START, gpu.PRODUCT_BOUNDS, gpu.PRODUCT_DEVICE)

EXCHANGE_START = {
    "quick_base_s": 6e-6,
    "quick_hop_s": 8e-7,
    "quick_efficiency": 0.25,
    "bulk_base_s": 3e-5,
    "bulk_efficiency": 0.65,
}
EXCHANGE_BOUNDS = {
    "quick_base_s": (1e-6, 1e-4),
    "quick_hop_s": (1e-7, 1e-5),
    "quick_efficiency": (0.02, 1.0),
    "bulk_base_s": (1e-6, 2e-4),
    "bulk_efficiency": (0.2, 1.2),
    "sharing": (0.01, 3.0),
}
NVLINK = Formula(_exchange, EXCHANGE_START, EXCHANGE_BOUNDS, tuple(EXCHANGE_START))
PCIE = Formula(
    _exchange, {**EXCHANGE_START, "sharing": 1.5}, EXCHANGE_BOUNDS, tuple(EXCHANGE_BOUNDS)
)


def _attention(table: Table, c: Coefficients) -> Array:
    names = ("batch", "heads", "kv_heads", "queries", "keys", "head")
    batch, heads, kv_heads, queries, keys, head = (table.columns[name] for name in names)
    chip = gpu.Chip.of(table.target, table.target.peak_ops["bfloat16"])
    kernel = gpu_attention.prefill if table.kind == "context" else gpu_attention.decode
    return kernel(batch, heads, kv_heads, queries, keys, head, chip, c, warm=True)


PREFILL = Formula(
    _attention,
    gpu_attention.PREFILL_START,
    gpu_attention.PREFILL_BOUNDS,
    gpu_attention.PREFILL_DEVICE,
)
DECODE = Formula(
    _attention, gpu_attention.DECODE_START, gpu_attention.DECODE_BOUNDS, gpu_attention.DECODE_DEVICE
)

READS_AND_WRITES = {"add": 3.0, "mul": 3.0, "div": 3.0, "pow": 3.0}
"""Of a row's kernel, in whole tensors; two for all others (a scalar operand is not read)."""


def _stream(table: Table, c: Coefficients) -> Array:
    chip = gpu.Chip.of(table.target, table.target.peak_ops["float32"])
    operators = table.columns["operator"]
    tensors = np.array([READS_AND_WRITES.get(str(one), 2.0) for one in operators])
    moved = 4.0 * table.columns["rows"] * table.columns["columns"] * tensors
    reduces = np.isin(operators, ("softmax", "ln"))
    return gpu.stream(moved, chip, c, reduces=reduces, warm=True)


STREAM = Formula(_stream, gpu.STREAM_START, gpu.STREAM_BOUNDS, gpu.STREAM_DEVICE)
