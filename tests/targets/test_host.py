"""The host CPU: what is read off it, and peaks that follow from instructions, cores and clock."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from trivium.compiler import targets
from trivium.targets.host import Cpu, detect, peak_ops

XEON = Cpu(
    vendor="GenuineIntel",
    flags=frozenset({"avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16"}),
    cores=4,
    clock_hz=2e9,
)


def test_detection_agrees_with_the_operating_system() -> None:
    cpu = detect()
    assert 1 <= cpu.cores <= (os.cpu_count() or 1)
    if cpu.memory_bytes is not None:
        assert cpu.memory_bytes <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_reading_twice_gives_the_same_target() -> None:
    assert targets.find("cpu") == targets.find("cpu")
    assert detect() == detect()


def test_a_xeon_does_64_float32_operations_a_cycle() -> None:
    peaks = peak_ops(XEON)
    assert peaks["float32"] == 64 * 4 * 2e9
    assert peaks["int8"] == 4 * peaks["float32"]
    assert peaks["bfloat16"] == 2 * peaks["float32"]
    assert "float16" not in peaks


def test_amx_multiplies_tiles() -> None:
    peaks = peak_ops(replace(XEON, flags=XEON.flags | {"amx_int8", "amx_bf16"}))
    assert peaks["int8"] == 4096 * 4 * 2e9
    assert peaks["bfloat16"] == 2048 * 4 * 2e9


def test_zen_4_has_half_the_rate_of_a_xeon() -> None:
    assert peak_ops(replace(XEON, vendor="AuthenticAMD"))["float32"] == 32 * 4 * 2e9


@pytest.mark.parametrize("change", [{"clock_hz": None}, {"flags": frozenset({"sse2"})}])
def test_what_cannot_be_derived_is_unknown(change: dict[str, object]) -> None:
    assert peak_ops(replace(XEON, **change)) == {}  # type: ignore[arg-type]  # two kinds of field


def test_only_what_is_known_is_claimed() -> None:
    target = targets.find("cpu")
    assert target.memory_bytes_per_s is None
    assert target.usd_per_hour is None
    assert target.watts is None
