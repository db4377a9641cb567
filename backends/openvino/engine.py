"""Talking to OpenVINO: one core for the process, its properties, and its errors as one line."""

from __future__ import annotations

import os
import re
from functools import cache
from typing import Any

DEVICE = "CPU"

# What OpenVINO puts around the sentence that tells.
_FRAME = re.compile(
    r"^(Exception from |FrontEnd API failed|Model wasn't fully|Summary:|While validating|"
    r"-- Conversion is failed|Check .* failed at )"
)


@cache
def core() -> Any:
    """The engine. Its telemetry, which would write a file in the home directory, stays off."""
    os.environ.setdefault("OPENVINO_TELEMETRY_DISABLE", "1")
    import openvino

    return openvino.Core()


def name() -> str:
    """What to call the engine in a refusal: its name and version."""
    import openvino

    return f"OpenVINO {'.'.join(openvino.get_version().split('-')[0].split('.')[:3])}"


def reason(error: BaseException) -> str:
    """The sentence of an error of OpenVINO that tells what it did not like."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    for line in lines:
        if line.startswith("-- No conversion rule found for operations: "):
            return f"no conversion of {line.rpartition(': ')[2]}"
    checks = [found[1] for line in lines if (found := re.search(r"Check '(.*)' failed at", line))]
    telling = [line for line in lines if not _FRAME.match(line) and not line.startswith("-- ")]
    if telling:
        return telling[0].rstrip(".")
    return f"not {checks[-1]}" if checks else (lines[-1] if lines else type(error).__name__)


def compile_file(path: str, precision: str, kv_cache: str | None = None) -> Any:
    """Read a model from a file and compile it for this CPU.

    The precisions are named, because OpenVINO otherwise computes float32 graphs in bfloat16 where a
    CPU has it, and holds keys and values in 8 bits.
    """
    model = core().read_model(path)
    properties = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    if kv_cache is not None:
        properties["KV_CACHE_PRECISION"] = kv_cache
    return core().compile_model(model, DEVICE, properties)
