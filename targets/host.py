"""The machine this runs on, as a target: what can be read off it, and nothing more.

Peaks are derived, not measured: operations per cycle and core of the widest vector (or tile)
instructions that the CPU reports, times physical cores, times the nominal clock. The clock is the
base frequency where the kernel tells it, so turbo makes a short burst faster than the peak says.
Memory bandwidth cannot be read anywhere; `with_bandwidth` measures it, for cost models only: what
changes from run to run must not be part of a target, and so of cache keys.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from trivium.compiler.errors import BadInput
from trivium.compiler.types import Target

_CPUINFO = Path("/proc/cpuinfo")
_MEMINFO = Path("/proc/meminfo")
_CPU0 = Path("/sys/devices/system/cpu/cpu0")
_CGROUP_MEMORY = Path("/sys/fs/cgroup/memory.max")

FMA_UNITS_512 = {"GenuineIntel": 2, "AuthenticAMD": 1}
"""512-bit multiply-add units of a core: server Xeons have two; Zen 4 runs a 512-bit operation on
its two 256-bit units, which is one (https://www.agner.org/optimize/microarchitecture.pdf)."""


@dataclass(frozen=True)
class Cpu:
    """What the operating system says of the CPU.

    Attributes:
        cores: Physical cores that this process may use.
        clock_hz: Nominal, not turbo.
        last_cache_bytes: The largest cache.
    """

    model: str = ""
    vendor: str = ""
    flags: frozenset[str] = frozenset()
    cores: int = 1
    clock_hz: float | None = None
    last_cache_bytes: float | None = None
    memory_bytes: float | None = None


def host(topology: str | None) -> Target:
    """Return the target ``cpu``."""
    if topology is not None:
        raise BadInput("the host CPU has no slices", about=f"cpu:{topology}", remedy="write cpu")
    return _host()


@cache
def _host() -> Target:
    cpu = detect()
    peaks = peak_ops(cpu)
    notes = ["memory bandwidth cannot be read off a CPU"]
    if not peaks:
        notes.append(f"no peak rates are derived for {cpu.model or platform.machine()}")
    return Target(
        name="cpu",
        family="cpu",
        backends=("onnxruntime", "openvino", "xla", "tvm"),
        title=cpu.model or f"this machine's {platform.machine()} CPU",
        peak_ops=peaks,
        memory_bytes=cpu.memory_bytes,
        on_chip_bytes=cpu.last_cache_bytes,
        clock_hz=cpu.clock_hz,
        units=cpu.cores,
        options={"isa": " ".join(flag for flag in SHOWN if flag in cpu.flags)},
        sources={
            "peak_ops": "derived: operations per cycle of the instructions that /proc/cpuinfo "
            "lists x physical cores x nominal clock",
            "memory_bytes": "/proc/meminfo and the memory limit of the control group",
            "on_chip_bytes": "the largest cache in /sys/devices/system/cpu/cpu0/cache",
            "clock_hz": "base frequency in /sys, or the model's name, or /proc/cpuinfo",
            "units": "physical cores in /proc/cpuinfo that this process may run on",
        },
        notes=tuple(notes),
    )


SHOWN = (
    *("avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16"),
)
"""The flags that decide how fast a model runs."""


def detect() -> Cpu:
    """Read the CPU off Linux; on other systems only the number of cores is known."""
    try:
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return Cpu(cores=os.cpu_count() or 1)
    processors = [dict(_pairs(block)) for block in text.strip().split("\n\n")]
    first = processors[0]
    return Cpu(
        model=first.get("model name", ""),
        vendor=first.get("vendor_id", ""),
        flags=frozenset(first.get("flags", "").split()),
        cores=_physical_cores(processors),
        clock_hz=_clock(first),
        last_cache_bytes=_largest_cache(),
        memory_bytes=_memory(),
    )


def _pairs(block: str) -> Iterator[tuple[str, str]]:
    for line in block.splitlines():
        key, _, value = line.partition(":")
        yield key.strip(), value.strip()


def _physical_cores(processors: list[dict[str, str]]) -> int:
    """Hardware threads of one core share its multiply-add units, so they count once."""
    allowed = os.sched_getaffinity(0)
    usable = [p for p in processors if int(p.get("processor", -1)) in allowed] or processors
    cores = {(p.get("physical id"), p.get("core id")) for p in usable}
    return len(usable) if (None, None) in cores else len(cores)


def _clock(processor: Mapping[str, str]) -> float | None:
    """Nominal clock: it has to be the same on every reading, since it is part of cache keys."""
    for name in ("base_frequency", "cpuinfo_max_freq"):
        try:
            return float((_CPU0 / "cpufreq" / name).read_text()) * 1e3
        except (OSError, ValueError):
            continue
    named = re.search(r"@ *([\d.]+) *GHz", processor.get("model name", ""))
    if named:
        return float(named[1]) * 1e9
    # Without frequency scaling (a virtual machine) this is the constant rate of the counter.
    listed = processor.get("cpu MHz")
    return round(float(listed)) * 1e6 if listed else None


def _largest_cache() -> float | None:
    sizes = []
    for file in _CPU0.glob("cache/index*/size"):
        found = re.fullmatch(r"(\d+)([KMG])", file.read_text().strip())
        if found:
            sizes.append(int(found[1]) * 1024.0 ** (" KMG".index(found[2])))
    return max(sizes, default=None)


def _memory() -> float | None:
    limits = []
    with contextlib.suppress(OSError):
        total = re.search(r"MemTotal: *(\d+) kB", _MEMINFO.read_text())
        limits += [int(total[1]) * 1024.0] if total else []
    with contextlib.suppress(OSError, ValueError):
        limits.append(float(_CGROUP_MEMORY.read_text()))
    return min(limits, default=None)


def peak_ops(cpu: Cpu) -> dict[str, float]:
    """Derive dense operations per second by dtype from the instructions of the CPU.

    A multiply-add counts two. Per cycle and core: AVX2 has two 256-bit FMA units (2 x 8 lanes x 2
    = 32 float32 operations), AVX-512 one or two of 512 bits (`FMA_UNITS_512`); VNNI does four int8
    products a lane, AVX512-BF16 two bfloat16 ones; AMX does 2048 bfloat16 or 4096 int8 operations.
    Without VNNI three instructions (maddubs, madd, add) do what one does, which is 4/3 of float32.
    """
    if cpu.clock_hz is None or "fma" not in cpu.flags:
        return {}
    wide = "avx512f" in cpu.flags and cpu.vendor in FMA_UNITS_512
    float32 = 32 * FMA_UNITS_512[cpu.vendor] if wide else 32
    vnni = "avx512_vnni" in cpu.flags if wide else "avx_vnni" in cpu.flags
    per_cycle = {"float32": float32, "float64": float32 / 2}
    per_cycle["int8"] = float32 * (4 if vnni else 4 / 3)
    if "avx512_bf16" in cpu.flags:
        per_cycle["bfloat16"] = float32 * 2
    if "avx512_fp16" in cpu.flags:
        per_cycle["float16"] = float32 * 2
    if "amx_bf16" in cpu.flags:
        per_cycle["bfloat16"] = 2048
    if "amx_int8" in cpu.flags:
        per_cycle["int8"] = 4096
    return {dtype: rate * cpu.cores * cpu.clock_hz for dtype, rate in per_cycle.items()}


def with_bandwidth(target: Target) -> Target:
    """A target with its memory bandwidth, measured if it is the host's and unknown."""
    if target.memory_bytes_per_s is not None or target.family != "cpu":
        return target
    return replace(target, memory_bytes_per_s=copy_bytes_per_s())


@cache
def copy_bytes_per_s(size: int = 16 << 20, rounds: int = 10) -> float:
    """Bytes read and written in a second by the best of a few copies between two arrays.

    Timed by this thread's own processor time, which other work on the machine does not stretch.
    """
    import numpy as np

    source = np.ones(size, np.uint8)
    destination = np.empty_like(source)
    best = float("inf")
    for _ in range(rounds):
        started = time.thread_time()
        np.copyto(destination, source)
        best = min(best, time.thread_time() - started)
    return 2.0 * size / best
