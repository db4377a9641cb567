"""The process that compiles: ``python -m trivium.backends.xla.worker JOB.json RESULT.json``.

A process of its own, because libtpu and the CUDA plug-in must be configured before jax is
imported (the caller may have imported it long ago, for another device), because a crash inside
of a compiler must not take the caller along, and so that time and memory can be bounded and
measured. Job and result are JSON, everything else goes through files; nothing is pickled.
What it makes of each program of the job is in `programs`.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trivium.backends.xla.compiling import compile_devices
from trivium.backends.xla.exporting import Json
from trivium.backends.xla.platforms import Device
from trivium.backends.xla.programs import build_program
from trivium.compiler.errors import BackendFailed, TriviumError, Unsupported


def main(arguments: Sequence[str]) -> int:
    """Read the job, do it, write the result; the exit status is 0 if there is a result."""
    job_path, result_path = map(Path, arguments)
    job = json.loads(job_path.read_text(encoding="utf-8"))
    _end_with(job["caller"])
    try:
        result = build(job)
    except TriviumError as error:
        result = {"error": error_json(error)}
    except Exception as error:  # jax raises many kinds; the caller gets one line of them
        result = {"error": error_json(translated(error, job["target"]))}
    usage = resource.getrusage(resource.RUSAGE_SELF)
    result["peak_rss_bytes"] = _peak_rss_bytes()
    result["cpu_seconds"] = round(usage.ru_utime + usage.ru_stime, 3)
    unfinished = result_path.with_suffix(".partial")
    unfinished.write_text(json.dumps(result), encoding="utf-8")
    os.replace(unfinished, result_path)
    return 0


def _peak_rss_bytes() -> int | None:
    """This process's largest resident size; getrusage's would begin with that of the caller."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if "VmHWM" in line)


def _end_with(caller: int) -> None:
    """Have the kernel end this process with the one that waits for it, where Linux can."""
    if sys.platform == "linux":
        parent_death_signal = 1
        ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGKILL)
        if os.getppid() != caller:  # it has ended already
            sys.exit(1)


def error_json(error: TriviumError) -> Json:
    """An error as JSON, for `process.raised`."""
    # The lowering has subclasses of its own, which the caller need not know.
    kind = next(one for one in type(error).__mro__ if one.__module__ == TriviumError.__module__)
    return {
        "type": kind.__name__,
        "cause": error.cause,
        "about": error.about,
        "remedy": error.remedy,
        "refusals": list(getattr(error, "refusals", ())),
    }


def translated(error: Exception, target: str) -> TriviumError:
    """The error of ours that says what one of jax's does, in a line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0] if lines else type(error).__name__
    if first.endswith(":") and len(lines) > 1:
        first = f"{first} {lines[1]}"
    notes = "; ".join(getattr(error, "__notes__", ()))
    cause = f"{first} ({notes})" if notes else first
    if "RESOURCE_EXHAUSTED" in first:
        return Unsupported(
            f"the program does not fit into the device's memory: {first[:300]}",
            about=target,
            remedy="use a larger slice, a smaller batch, or a recipe with smaller weights",
        )
    return BackendFailed(cause[:500], about=f"XLA for {target}")


def build(job: Mapping[str, Any]) -> Json:
    """Export and compile every program of a job; return what there is to say of each."""
    started = time.perf_counter()
    device = Device(**job["device"])
    devices = compile_devices(device)
    ready = time.perf_counter()
    programs = {
        name: build_program(name, dims, job, device, devices)
        for name, dims in job["programs"].items()
    }
    return {
        "programs": programs,
        "device_kind": devices[0].device_kind,
        "devices": len(devices),
        "start_seconds": round(ready - started, 3),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
