"""Published latencies and throughputs of whole models, beside the kernels that they come down to.

A row's seconds are what the engine took for some calls (a batch, or a prefill and all steps of a
generation); `table` turns rows into one whose columns an engine's coefficients are fitted on: the
seconds that the kernel formulas give, wide and narrow products apart, the calls and the exchanges
between chips.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import onnx_ir as ir

from benchmarks import fitting, formulas, measured, transformers
from benchmarks.fitting import Array, Coefficients, Formula, Table
from benchmarks.transformers import Shape
from trivium.compiler import targets
from trivium.compiler.calibration import spread_of
from trivium.compiler.cost import melts_elementwise
from trivium.compiler.kernels import Kernel
from trivium.compiler.machines import collectives
from trivium.compiler.machines.base import Context
from trivium.compiler.machines.gpu_kernels import GpuMachine
from trivium.compiler.passing import is_op
from trivium.compiler.types import Target
from trivium.compiler.work import is_weight
from trivium.targets import calibrations


@dataclass(frozen=True)
class Call:
    """A program that runs ``times``, each followed by ``exchanges`` of ``exchanged_bytes``."""

    kernels: tuple[Kernel, ...]
    times: float = 1.0
    exchanges: float = 0.0
    exchanged_bytes: float = 0.0


@dataclass(frozen=True)
class Row:
    """A published figure.

    Attributes:
        group: What the engine's coefficients are fitted without when the row is scored.
    """

    engine: str
    target: Target
    group: str
    what: str
    calls: tuple[Call, ...]
    chips: int
    seconds: float


def fuses_bias(node: ir.Node) -> bool:
    """PyTorch without a compiler: a bias is added within the product, nothing else is fused."""
    return is_op(node, "Add") and any(v is not None and is_weight(v) for v in node.inputs)


BERT = {
    "BERT Base": Shape(12, 768, 12, 3072, causal=False),
    "BERT Large": Shape(24, 1024, 16, 4096, causal=False),
}

DECODERS = {
    "GPT-J-6B": Shape(28, 4096, 16, 16384, parallel=True, vocabulary=50400),
    "LLaMA-7B": Shape(32, 4096, 32, 11008, gated=True, vocabulary=32000),
    "LLaMA-70B": Shape(80, 8192, 64, 28672, kv_heads=8, gated=True, vocabulary=32000),
    "Falcon-180B": Shape(80, 14848, 232, 59392, kv_heads=8, parallel=True, vocabulary=65024),
}

EAGER = {
    "bert_large": Shape(24, 1024, 16, 4096, causal=False, flash=False, vocabulary=30522),
    "gpt2_large": Shape(36, 1280, 20, 5120, flash=False, vocabulary=50257, gelu=8),
    "gpt3_xl": Shape(24, 3072, 24, 12288, flash=False, vocabulary=50257, gelu=8),
    "gpt3_27": Shape(32, 2560, 32, 10240, flash=False, vocabulary=50257, gelu=8),
    "opt_13": Shape(24, 2048, 32, 8192, flash=False, vocabulary=50272),
}

SERVERS = {"H100": "nvidia-h100-sxm", "A100": "nvidia-a100-80-sxm", "L40S": "nvidia-l40s"}


@cache
def tensorrt_bert() -> tuple[Row, ...]:
    """NVIDIA's demo on an A100 with 40 GB."""
    rows = []
    target = targets.find("nvidia-a100-40-sxm")
    path = measured.folder() / "measured/nvidia_tensorrt_bert/bert_latency.csv"
    with path.open() as stream:
        for row in csv.DictReader(stream):
            shape = BERT.get(row["model"])
            if shape is None:
                continue
            batch, queries = int(row["batch"]), int(row["seq_len"])
            for column, dtype in (("int8", "int8"), ("fp16", "float16")):
                found = transformers.kernels(
                    shape, melts_elementwise, batch=batch, queries=queries, dtype=dtype
                )
                group = f"{row['model']} {dtype}"
                seconds = float(row[f"{column}_avg_ms"]) / 1e3
                what = f"{group}, batch {batch}, length {queries}"
                rows.append(Row("tensorrt", target, group, what, (Call(tuple(found)),), 1, seconds))
    return tuple(rows)


@cache
def pytorch() -> tuple[Row, ...]:
    """NeuSight's inference in float32, without a compiler; the mixture of experts is left out."""
    rows = []
    folder = measured.folder() / "measured/neusight/label"
    for path in sorted(folder.glob("*-inf-*.json")):
        device, _, name = path.stem.partition("__")
        found = re.fullmatch(r"(\w+)-inf-(\d+)-(\d+)", name)
        if found is None or found[1] not in EAGER:
            continue
        shape, queries, batch = EAGER[found[1]], int(found[2]), int(found[3])
        kernels = transformers.kernels(
            shape, fuses_bias, batch=batch, queries=queries, dtype="float32"
        )
        target = measured.neusight_target(device.replace("_", " ") if "80GB" in device else device)
        seconds = json.loads(path.read_text())["e2e_latency"] / 1e3
        what = f"{found[1]}, batch {batch}, length {queries}"
        rows.append(Row("pytorch", target, target.name, what, (Call(tuple(kernels)),), 1, seconds))
    return tuple(rows)


def generation(shape: Shape, batch: int, prompt: int, new: int, dtype: str) -> tuple[Call, ...]:
    """A prefill and the steps after it, the latter at four lengths of the cache."""
    wide = batch * shape.width * 2.0
    exchanges = (1.0 if shape.parallel else 2.0) * shape.layers if shape.split > 1 else 0.0

    def call(queries: int, past: int, times: float) -> Call:
        found = transformers.kernels(
            shape, melts_elementwise, batch=batch, queries=queries, past=past, dtype=dtype
        )
        return Call(tuple(found), times, exchanges, wide * queries)

    calls = [call(prompt, 0, 1.0)]
    calls += [call(1, prompt + int(new * part), new / 4) for part in (0.125, 0.375, 0.625, 0.875)]
    return tuple(calls if new > 1 else calls[:1])


@cache
def tensorrt_llm() -> tuple[Row, ...]:
    """Static batches, and the first token of a single sequence."""
    rows = []
    folder = measured.folder() / "measured/tensorrt_llm"
    for name, streaming in (("static_batch_v0.6.1.csv", False), ("ttft_bs1_v0.5.csv", True)):
        with (folder / name).open() as stream:
            for row in csv.DictReader(stream):
                split, batch = int(row["tp"]), int(row["batch"])
                shape = replace(DECODERS[row["model"]], split=split)
                dtype = {"FP8": "float8", "FP16": "float16"}[row["precision"]]
                prompt, new = int(row["isl"]), 1 if streaming else int(row["osl"])
                target = targets.find(SERVERS[row["gpu"]])
                if streaming:
                    seconds = float(row["first_token_ms"]) / 1e3
                else:
                    # The figure is for one GPU of those that share the model.
                    seconds = batch * new / (float(row["value"]) * split)
                calls = generation(shape, batch, prompt, new, dtype)
                what = f"{row['model']} {dtype}, batch {batch}, {prompt} + {new}, {split} GPUs"
                engine = "tensorrt_llm"
                rows.append(Row(engine, target, row["gpu"], what, calls, split, seconds))
    return tuple(rows)


Machines = Callable[[Target], GpuMachine]


shipped: Machines = calibrations.gpu_machine
"""The coefficients that ship."""

ROWS = 600
"""Of a device's kernels, as for what ships."""


@cache
def _of_kernels(name: str) -> Mapping[str, Coefficients]:
    """What the kernels that NeuSight measured on a GPU say of it: nothing of a whole model."""
    found = {}
    for table, formula, tables in (
        ("product_float32", formulas.FLOAT_PRODUCT, measured.float_products()),
        ("stream", formulas.STREAM, measured.rows_kernels()),
    ):
        prior = calibrations.of_family("gpu", table).coefficients
        for own in tables:
            if own.target.name == name:
                rows, _ = own.halves(ROWS, 1)
                found[table] = fitting.fit(formula, [rows], prior, formula.device, pull=0.02)
    return found


def with_own_kernels(target: Target) -> GpuMachine:
    """The coefficients that ship, and those of the device's own float32 kernels where they were
    measured: what ``trivium calibrate`` would know of a GPU that no file ships for."""
    machine = calibrations.gpu_machine(target)
    known = dict(machine.calibrations)
    for table, coefficients in _of_kernels(target.name.replace("_", "-")).items():
        known[table] = replace(known[table], coefficients=coefficients)
    return replace(machine, calibrations=known)


MACHINES: Mapping[str, Machines] = {"pytorch": with_own_kernels}
"""Where an engine's rows are on devices without a file that ships."""


def table(rows: Sequence[Row], machines: Machines | None = None) -> Table:
    """What the kernel formulas say of some rows of one engine."""
    machines = machines or MACHINES.get(rows[0].engine, shipped)
    columns: Mapping[str, list[float]] = {
        "wide": [],
        "narrow": [],
        "calls": [],
        "exchange": [],
        "decode": [],
        "sharing": [],
        "first": [],
    }
    known = {row.target.name: row.target for row in rows}
    made = {name: machines(target) for name, target in known.items()}
    if rows[0].engine == "tensorrt_llm":
        # Its decode kernels are its own: what another library reached on a device says little.
        common = calibrations.of_family("gpu", "decode")
        made = {
            name: replace(one, calibrations={**one.calibrations, "decode": common})
            for name, one in made.items()
        }
    for row in rows:
        sums = dict.fromkeys(columns, 0.0)
        for call in row.calls:
            for name, value in _parts(call, row, made[row.target.name]).items():
                sums[name] += value * call.times
        sums["sharing"] = max(_group(call) for call in row.calls)
        sums["calls"] -= sums["first"]
        for name, value in sums.items():
            columns[name].append(value)
    arrays: dict[str, Array] = {name: np.array(values) for name, values in columns.items()}
    arrays["group"] = np.array([row.group for row in rows])
    arrays["device"] = np.array([row.target.name for row in rows])
    seconds = np.array([row.seconds for row in rows])
    return Table(f"engine_{rows[0].engine}", rows[0].target, "", arrays, seconds, rows[0].engine)


def _group(call: Call) -> float:
    """Query heads that share a head of keys and values."""
    sizes = [size for kernel in call.kernels for size in kernel.attentions]
    return max((size.heads / size.kv_heads for size in sizes), default=1.0)


def _parts(call: Call, row: Row, machine: GpuMachine) -> dict[str, float]:
    held = sum(kernel.weight_bytes * kernel.times for kernel in call.kernels)
    context = Context(1.0, held, {"float16": ("float16", "bfloat16")})
    times, notes = machine.time(call.kernels, row.target, context)
    sums = {"wide": 0.0, "narrow": 0.0, "decode": 0.0, "calls": 1.0, "exchange": 0.0}
    sums["first"] = float(call.times == 1.0)
    in_float8 = any("float8" in kernel.dense for kernel in call.kernels)
    for kernel, time in zip(call.kernels, times, strict=True):
        assert time is not None, notes
        narrow = bool({"int8", "float8"} & set(kernel.dense))
        decode = bool(kernel.attentions) and kernel.attentions[0].queries == 1
        # With products in float8, that library keeps the cache in it too.
        share = 0.5 if decode and in_float8 else 1.0
        name = "decode" if decode else "narrow" if narrow else "wide"
        sums[name] += time.seconds * kernel.times * share
    if call.exchanges:
        calibration = calibrations.find(row.target, collectives.table(row.target))
        found = collectives.predict(
            "all_reduce", call.exchanged_bytes, row.chips, row.target, calibration
        )
        assert found is not None
        sums["exchange"] = found.seconds * call.exchanges
    return sums


def _predict(one: Table, c: Coefficients) -> Array:
    columns = one.columns
    return np.asarray(
        c["call_s"] * columns["calls"]
        + c["first_s"] * columns["first"]
        + c["pace"] * (columns["wide"] + c["narrow_pace"] * columns["narrow"])
        + c["decode_pace"] * columns["decode"] * columns["sharing"] ** c["group"]
        + columns["exchange"]
    )


def _formula(*names: str) -> Formula:
    start = {
        "call_s": 2e-4,
        "first_s": 2e-4,
        "pace": 1.0,
        "narrow_pace": 1.0,
        "decode_pace": 1.0,
        "group": 0.5,
    }
    bounds = {
        "call_s": (1e-7, 1e-1),
        "first_s": (1e-7, 1e-1),
        "pace": (0.3, 3.0),
        "narrow_pace": (0.3, 3.0),
        "decode_pace": (0.2, 5.0),
        "group": (1e-3, 1.0),
    }
    return Formula(_predict, start, bounds, names)


ENGINES = {
    "tensorrt": _formula("first_s", "pace", "narrow_pace"),
    "pytorch": _formula("first_s", "pace"),
    "tensorrt_llm": _formula("call_s", "first_s", "pace", "decode_pace", "group"),
}
"""What an engine adds to its kernels: seconds of each call (the first apart, where it reads a
prompt), how its kernels compare with those that the formulas were calibrated on, and, of a decode
kernel, how much of the cache it reads again for each query head of a group."""


def fit(rows: Table) -> dict[str, float]:
    """An engine's coefficients."""
    formula = ENGINES[rows.source]
    return fitting.fit(formula, [rows], formula.start, formula.device, pull=0.02)


def spread_between_groups(rows: Table) -> float:
    """How far coefficients without a group miss it; of a single group, how far they miss it."""
    formula = ENGINES[rows.source]
    groups = sorted(set(rows.columns["group"].tolist()))
    errors: list[float] = []
    for group in groups:
        inside = rows.columns["group"] == group
        rest = rows.take(np.flatnonzero(~inside)) if len(groups) > 1 else rows
        one = rows.take(np.flatnonzero(inside))
        errors += fitting.residuals(formula, one, fit(rest)).tolist()
    return spread_of(errors)


def fits_in_memory() -> list[tuple[bool, bool]]:
    """For each model and GPU of NeuSight's tables: was it said not to fit, and is it missing?"""
    from trivium.compiler.kernels import peak_activation_bytes

    names = ["Tesla_P4", "Tesla_P100-PCIE-16GB", "Tesla_V100-PCIE-32GB", "NVIDIA_A100-PCIE-40GB"]
    folder = measured.folder() / "measured/neusight/label"
    sizes = {"bert_large": (512, (8, 16)), "gpt2_large": (1024, (4, 8))}
    sizes |= dict.fromkeys(("gpt3_xl", "gpt3_27", "opt_13"), (2048, (2, 8)))
    found = []
    for name in names:
        memory = measured.neusight_target(name).memory_bytes or 0.0
        for model, (queries, batches) in sizes.items():
            shape = EAGER[model]
            for batch in batches:
                graph = transformers.layer(shape, batch, queries, 0, "float32").graph
                logits = 4.0 * batch * queries * shape.vocabulary
                weights = 4.0 * (shape.parameters + shape.width * shape.vocabulary)
                peak = weights + max(peak_activation_bytes(graph, fuses_bias), logits)
                missing = not (folder / f"{name}__{model}-inf-{queries}-{batch}.json").is_file()
                found.append((peak > memory, missing))
    return found
