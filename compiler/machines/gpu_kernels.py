"""The kernels of a model on a GPU, timed by the formulas for products, attention and streams.

All kernels are timed at once, so that a model of a thousand is as quick as one of ten. What a
formula needs and a kernel does not state (a recurrent layer's products) is bound by the peak rates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from trivium.compiler.calibration import Calibration
from trivium.compiler.kernels import Kernel
from trivium.compiler.machines import gpu, gpu_attention
from trivium.compiler.machines.base import Context, KernelTime
from trivium.compiler.types import Target
from trivium.compiler.work import Product

TABLES = ("product", "product_float8", "product_float32", "prefill", "decode", "stream")
"""The calibrations that a `GpuMachine` asks for."""

REDUCING = {
    *("Softmax", "LogSoftmax", "LayerNormalization", "RMSNormalization", "GroupNormalization"),
    *("InstanceNormalization", "SimplifiedLayerNormalization", "SkipLayerNormalization"),
    *("SkipSimplifiedLayerNormalization", "ReduceMean", "ReduceSum", "ReduceMax"),
}
"""What has to see a whole row before it can write."""

FORMS = {"float32": "product_float32", "float64": "product_float32"} | dict.fromkeys(
    ("float8", "int8", "int4", "float4"), "product_float8"
)
"""Which products a dtype's are like: the ordinary cores', the narrow ones, else bfloat16."""

NARROW = frozenset(("float8", "int8", "int4", "float4"))

WIDTHS = {"float64": 8.0, "float32": 4.0, "int8": 1.0, "float8": 1.0, "int4": 0.5, "float4": 0.5}
DEPTHWISE_BELOW = 8.0
"""Output channels of a group from which a convolution no longer looks like a product."""

VECTOR_SHARE = 0.5
"""Of the ordinary cores' peak that elementwise arithmetic reaches."""

_Key = tuple[str, str]


@dataclass(frozen=True)
class GpuMachine:
    """Times kernels with calibrated formulas.

    Attributes:
        calibrations: By name of the table.
        gap_s: What the host adds to every kernel when it launches them one by one.
        pace, narrow_pace: How much longer an engine's own kernels take than those that the
            formulas were calibrated on; the latter besides for products of int8 and narrower.
    """

    calibrations: Mapping[str, Calibration]
    gap_s: float = 0.0
    pace: float = 1.0
    narrow_pace: float = 1.0

    def time(
        self, kernels: Sequence[Kernel], target: Target, context: Context
    ) -> tuple[list[KernelTime | None], tuple[str, ...]]:
        """Time one run of each kernel; ``None`` and a note where a figure is missing."""
        if target.memory_bytes_per_s is None:
            note = f"no published memory bandwidth of {target.name}"
            return [None] * len(kernels), (note,)
        batch = _Batch(self, target, context)
        pending = [batch.add(kernel) for kernel in kernels]
        batch.run()
        found = [
            self._paced(one.result(), kernel) if one else None
            for one, kernel in zip(pending, kernels, strict=True)
        ]
        return found, tuple(batch.notes)

    def _paced(self, time: KernelTime, kernel: Kernel) -> KernelTime:
        pace = self.pace * (self.narrow_pace if NARROW.intersection(kernel.dense) else 1.0)
        if pace == 1.0:
            return time
        return KernelTime(
            time.launch * pace, time.compute * pace, time.memory * pace, time.busy * pace
        )

    @cached_property
    def launch_s(self) -> float:
        """One kernel after another."""
        return self.calibrations["product"]["launch_s"] + self.gap_s


@dataclass
class _Pending:
    """A kernel whose products wait to be timed with all others."""

    batch: _Batch
    products: list[tuple[_Key, int]]
    compute: float
    memory: float
    launch: float

    def result(self) -> KernelTime:
        compute, memory, launch = self.compute, self.memory, self.launch
        body = max(compute, memory)
        for key, index in self.products:
            parts = self.batch.timed[key]
            own = float(parts.body[index])
            bound = max(float(parts.compute[index]), float(parts.on_chip[index]))
            # The formula's smooth maximum belongs to whichever part is the larger.
            if bound >= float(parts.memory[index]):
                compute, body = compute + own, body + own
                memory += float(parts.memory[index])
            else:
                memory, body = memory + own, body + own
                compute += bound
            launch = max(launch, float(parts.launch[index]) + self.batch.machine.gap_s)
        return KernelTime(launch, min(compute, body), min(memory, body), body)


class _Batch:
    """All products of a call, by dtype, timed in one go."""

    def __init__(self, machine: GpuMachine, target: Target, context: Context) -> None:
        self.machine, self.target, self.context = machine, target, context
        self.products: dict[_Key, list[tuple[Product, Kernel]]] = {}
        self.timed: dict[_Key, gpu.Parts] = {}
        self.notes: dict[str, None] = {}

    def add(self, kernel: Kernel) -> _Pending | None:
        """Queue the products of a kernel, and time the rest of it."""
        context, target = self.context, self.target
        share = context.share
        moved = kernel.weight_bytes + kernel.activation_bytes * share
        if not moved and not kernel.dense and not kernel.vector:
            return _Pending(self, [], 0.0, 0.0, 0.0)
        vector = sum(kernel.vector.values()) * share
        peak = target.peak_ops.get("float32")
        arithmetic = vector / (peak * VECTOR_SHARE) if peak else 0.0
        keys: dict[str, tuple[_Key, float]] = {}
        for dtype in kernel.dense:
            name, slower = context.arithmetic(dtype, target.peak_ops)
            if name is None:
                self.notes[f"no published {dtype} rate of {target.name}"] = None
                return None
            keys[dtype] = (FORMS.get(name, "product"), name), slower
        queued, compute, cache, known = [], 0.0, 0.0, 0.0
        first = next(iter(keys.values()), None)
        if first is not None:
            for product in kernel.products:
                if product.n < DEPTHWISE_BELOW and product.batch > 1:
                    continue
                key, slower = first
                waiting = self.products.setdefault(key, [])
                queued.append((key, len(waiting)))
                waiting.append((_shared(product, share, slower), kernel))
                known += product.operations
            for attention in kernel.attentions:
                key, slower = first
                seconds = self._attention(attention, key[1], share) * slower
                if _decodes(attention):
                    # Whatever it waits for, it reads a cache.
                    cache += seconds
                else:
                    compute += seconds
                known += 4.0 * math.prod(attention[:2]) * math.prod(attention[3:6])
        rest = max(sum(kernel.dense.values()) - known, 0.0) * share
        if rest > 0.01 * known and first is not None:
            compute += rest * first[1] / (self._peak(first[0]) * VECTOR_SHARE)
        stream = self._stream(kernel, moved)
        launch = self.machine.launch_s
        if not queued and not kernel.attentions:
            return _Pending(self, [], compute + arithmetic, stream, launch)
        # What an epilogue reads besides the product's own operands.
        extra = max(moved - self._own_bytes(kernel, share), 0.0)
        memory = self._rest(extra, kernel) + cache
        return _Pending(self, queued, compute, memory, launch)

    def run(self) -> None:
        """Time what was queued."""
        for key, waiting in self.products.items():
            table, dtype = key
            sizes = np.array([product[:4] for product, _ in waiting], float).T
            m, n, k, batch = sizes
            width = WIDTHS.get(dtype, 2.0)
            # An element is read as long after it was written as the rest of its producer and the
            # part of its reader before it take: what one kernel moves. The result counts besides.
            activations = np.array([kernel.read_bytes for _, kernel in waiting])
            weights = np.array([kernel.weight_bytes for _, kernel in waiting])
            written = np.array([kernel.written_bytes for _, kernel in waiting])
            right = np.where(weights > 0, self.context.held_bytes, activations)
            # Weights that are stored narrower than they are multiplied are read as stored.
            stored = np.where(weights > 0, weights / np.maximum(n * k * batch, 1.0), width)
            chip = gpu.Chip.of(self.target, self._peak(key))
            self.timed[key] = gpu.product(
                m,
                n,
                k,
                chip,
                self._coefficients(table),
                batch=batch,
                width=width,
                weight_width=np.minimum(stored, width),
                out_width=np.minimum(written / np.maximum(m * n * batch, 1.0), 4.0),
                left_bytes=np.array([kernel.read_bytes or np.inf for _, kernel in waiting]),
                left_span=activations,
                right_span=right,
                lasting=self._lasting(key),
            )

    def _lasting(self, key: _Key) -> float:
        """Ordinary cores are busy for most of a model in float32, so that the power cap acts on
        its length. Matrix units rest between products: whole models show no more of it than
        their products one by one."""
        if key[0] != "product_float32":
            return 0.0
        done = sum(one.operations * kernel.times for one, kernel in self.products[key])
        return done / self._peak(key)

    def _coefficients(self, table: str) -> Mapping[str, float]:
        """Those of a table, with the launch of kernels that follow one another in a graph: some
        tables were measured call by call."""
        common = self.machine.calibrations["product"]
        launch = {name: common[name] for name in ("launch_s", "ramp_cycles")}
        return {**self.machine.calibrations[table].coefficients, **launch}

    def _peak(self, key: _Key) -> float:
        return self.target.peak_ops[key[1]]

    def _stream(self, kernel: Kernel, moved: float) -> float:
        """Seconds of moving a kernel's bytes, without its launch."""
        c = {**self.machine.calibrations["stream"].coefficients, "base_s": 0.0}
        c["half_bytes_s"] = 0.0
        chip = gpu.Chip.of(self.target, 1.0)
        reduces = bool(REDUCING.intersection(kernel.op_types))
        held = kernel.weight_bytes + kernel.activation_bytes
        warm = held <= chip.whole_cache * c["resident"]
        return float(gpu.stream(moved, chip, c, reduces=reduces, warm=warm))

    def _rest(self, moved: float, kernel: Kernel) -> float:
        """Seconds of what an epilogue reads: most often a sum's other operand, which was written
        some kernels ago (a residual's block has three)."""
        c = self.machine.calibrations["stream"]
        chip = gpu.Chip.of(self.target, 1.0)
        kept = chip.cache * self.machine.calibrations["product"]["resident"]
        cold = min(max(3.0 * kernel.activation_bytes / kept - 1.0, 0.0), 0.5) / 0.5
        return moved * (cold + (1.0 - cold) / c["on_chip"]) / (chip.bandwidth * c["memory"])

    def _own_bytes(self, kernel: Kernel, share: float) -> float:
        if kernel.attentions:
            return kernel.weight_bytes + kernel.activation_bytes * share
        narrow = WIDTHS.get(next(iter(kernel.dense), ""), 2.0)
        operands = sum(
            min(product.batch * product.m * product.k * narrow, kernel.read_bytes)
            + min(product.batch * product.m * product.n * 4.0, kernel.written_bytes)
            for product in kernel.products
        )
        return kernel.weight_bytes + operands * share

    def _attention(self, size: tuple[float, ...], dtype: str, share: float) -> float:
        batch, heads, kv_heads, queries, keys, head, causal = size
        chip = gpu.Chip.of(self.target, self.target.peak_ops[dtype])
        width = max(WIDTHS.get(dtype, 2.0), 2.0)
        phase = "decode" if _decodes(size) else "prefill"
        # The launch is counted with the kernel; the tables' base holds several.
        c = {**self.machine.calibrations[phase].coefficients, "base_cycles": 0.0}
        sizes = (batch * share, heads, kv_heads, queries, keys, head)
        if phase == "decode":
            return float(gpu_attention.decode(*sizes, chip, c, width=width))
        return float(
            gpu_attention.prefill(
                *sizes, chip, c, causal=bool(causal), stores=False, warm=True, width=width
            )
        )


def _decodes(size: tuple[float, ...]) -> bool:
    """A few queries against a cache."""
    return size[3] < 16 <= size[4]


def _shared(product: Product, share: float, slower: float) -> Product:
    """The part of a product that one chip does, as often as its dtype takes."""
    if product.batch > 1:
        return product._replace(batch=max(product.batch * share, 1.0) * slower)
    return product._replace(m=max(product.m * share, 1.0), batch=slower)
