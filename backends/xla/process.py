"""Running the worker: its environment, its deadline, and what became of it, as one error line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trivium.compiler import errors
from trivium.compiler.errors import BackendFailed, TriviumError

DEADLINE_S = 1800.0
"""How long a compile may take by default, seconds."""

_KINDS: Mapping[str, type[TriviumError]] = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, TriviumError)
}


def run(
    job: Mapping[str, Any], environment: Mapping[str, str], deadline: float = DEADLINE_S
) -> dict[str, Any]:
    """Do a job in a worker process and return its result.

    Args:
        job: What `worker.build` takes.
        environment: Variables to set for the worker, beside the ones of this process.
        deadline: Seconds after which the worker is killed.

    Raises:
        TriviumError: The one that the worker raised.
        BackendFailed: The worker died or did not finish in time.
    """
    with tempfile.TemporaryDirectory(prefix="trivium-xla-") as folder:
        job_path, result_path = Path(folder) / "job.json", Path(folder) / "result.json"
        log_path = Path(folder) / "log.txt"
        job_path.write_text(json.dumps({**job, "caller": os.getpid()}), encoding="utf-8")
        # -P: a folder called compiler or jax in the working directory must not be imported.
        command = [sys.executable, "-P", "-m", "trivium.backends.xla.worker"]
        with log_path.open("wb") as log:
            status = _wait(
                subprocess.Popen(
                    [*command, str(job_path), str(result_path)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env={**os.environ, **environment, "TMPDIR": folder},
                    start_new_session=True,
                ),
                deadline,
            )
        if status is None:
            raise BackendFailed(
                f"the compile did not finish within {deadline:g} s and was stopped",
                about="XLA",
                remedy="allow more with --option deadline=SECONDS",
            )
        if not result_path.is_file():
            raise BackendFailed(death(status, log_path), about="XLA")
        result: dict[str, Any] = json.loads(result_path.read_text(encoding="utf-8"))
    if "error" in result:
        raise raised(result["error"])
    return result


def _wait(process: subprocess.Popen[bytes], deadline: float) -> int | None:
    """The exit status, or None if the deadline passed. No process is left behind either way."""
    try:
        return process.wait(timeout=deadline)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def death(status: int, log_path: Path) -> str:
    """What a worker that left no result died of."""
    lines = log_path.read_text(encoding="utf-8", errors="replace").splitlines()
    said = next((line.strip() for line in reversed(lines) if _telling(line)), "")
    if status < 0:
        name = signal.Signals(-status).name
        hint = " (out of memory?)" if name == "SIGKILL" and not said else ""
        return f"the compiler was ended by {name}{hint}{': ' + said[:300] if said else ''}"
    return f"the compiler ended with status {status}{': ' + said[:300] if said else ''}"


def _telling(line: str) -> bool:
    """Whether a line of the log says why: no blank, no stack frame, no address."""
    line = line.strip()
    return bool(line) and not line.startswith(("@", "***", "File ", "0x", "PC:"))


def raised(table: Mapping[str, Any]) -> TriviumError:
    """The error that a worker wrote down as `worker.error_json`."""
    kind = _KINDS.get(table["type"], BackendFailed)
    about, remedy = table["about"], table["remedy"]
    if issubclass(kind, errors.Unsupported):
        return kind(table["cause"], about=about, remedy=remedy, refusals=table["refusals"])
    return kind(table["cause"], about=about, remedy=remedy)
