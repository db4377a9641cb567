"""Running a spread program without its devices: as many as it takes are made of this CPU.

XLA makes several devices of one CPU only if it is told so before jax starts, so that takes a
process of its own, ``python -m trivium.backends.xla.simulation ARTIFACT FOLDER``. It loads the
artifact once and then answers, line by line, the name of a file of feeds in the folder with ``ok``
or an error; results lie beside the feeds. It ends with its standard input.

Up to `partition.SIMULATED` devices are simulated. A larger mesh is run with shorter axes (see
`partition.reduced`): the same annotations, fewer parts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from trivium.backends.xla.partition import SIMULATED, Partition
from trivium.backends.xla.process import death, raised
from trivium.compiler.artifact import Artifact
from trivium.compiler.backend import Tensors
from trivium.compiler.errors import BackendFailed, TriviumError
from trivium.compiler.types import TensorInfo

if TYPE_CHECKING:
    import numpy as np

_FLAGS = (
    "--xla_force_host_platform_device_count={devices}"
    # Devices that share a few cores wait for one another longer than real ones.
    " --xla_cpu_collective_call_terminate_timeout_seconds=600"
)


def devices_of(artifact: Artifact) -> int:
    """How many devices the simulation of an artifact takes; 0 if it has nothing to simulate."""
    most = 0
    for one in artifact.manifest["details"]["xla"]["programs"].values():
        if one.get("simulated"):
            devices = Partition.from_json(one["simulated"]["partition"]).devices
            all_stages = devices * len(one.get("stages") or [one])
            # Stages have devices of their own if there are enough for all, else they share them.
            most = max(most, all_stages if all_stages <= SIMULATED else devices)
    return most


def described(name: str, split: Partition, small: Partition, lowered: Any) -> dict[str, Any]:
    """What is run here of a program that is spread: its export if it is another, how that
    is spread, and the bytes of all shards of the weights together.
    """
    kind = "sharded" if small == split else "simulated"
    copies = {n: small.devices // small.shards(n) for n in lowered.weights}
    return {
        "file": f"{name}.{kind}.stablehlo" if split.kind == "annotated" else None,
        "partition": small.to_json(),
        "bytes": sum(tensor.nbytes * copies[n] for n, tensor in lowered.weights.items()),
    }


def hindrance(artifact: Artifact) -> str | None:
    """Why this machine cannot simulate an artifact's devices, or None."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    programs = artifact.manifest["details"]["xla"]["programs"].values()
    needed = max(one["simulated"]["bytes"] for one in programs if one.get("simulated"))
    if needed <= 0.8 * free:
        return None
    return f"its shards take {needed / 2**30:.1f} GiB together, {free / 2**30:.1f} GiB are free"


class Simulation:
    """An artifact on simulated devices: an ``Executable`` whose work is done by a child.

    A generator is driven there too: what comes back is what `verify.outputs_of` gives.
    """

    measures_target = False

    def __init__(self, artifact: Artifact) -> None:
        self.inputs: Sequence[TensorInfo] = artifact.inputs
        self._folder = tempfile.TemporaryDirectory(prefix="trivium-xla-")
        self._log = Path(self._folder.name) / "log.txt"
        flags = " ".join((os.environ.get("XLA_FLAGS", ""), _FLAGS))
        command = [sys.executable, "-P", "-m", __name__]
        with self._log.open("wb") as log:
            self._child = subprocess.Popen(
                [*command, str(artifact.path.resolve()), self._folder.name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={
                    **os.environ,
                    "JAX_PLATFORMS": "cpu",
                    "XLA_FLAGS": flags.format(devices=devices_of(artifact)).strip(),
                },
                text=True,
            )
        try:
            self.where = str(self._answer()["where"])
        except BaseException:
            self.close()
            raise

    def run(self, feeds: Tensors) -> dict[str, np.ndarray[Any, Any]]:
        from trivium.compiler import verify

        verify.write_samples(Path(self._folder.name), "feeds.npz", [feeds])
        assert self._child.stdin is not None
        try:
            print("feeds.npz", file=self._child.stdin, flush=True)
        except BrokenPipeError:
            raise BackendFailed(self._death(), about="XLA on simulated devices") from None
        self._answer()
        return verify.read_samples(Path(self._folder.name) / "results.npz")[0]

    def close(self) -> None:
        """End the child. What is not closed ends with this process at the latest."""
        if self._child.stdin is not None:
            self._child.stdin.close()
        self._child.kill()
        self._child.wait()
        self._folder.cleanup()

    def __del__(self) -> None:
        if hasattr(self, "_child") and self._child.poll() is None:
            self.close()

    def _answer(self) -> Mapping[str, Any]:
        line = cast("IO[str]", self._child.stdout).readline()
        if not line:
            raise BackendFailed(self._death(), about="XLA on simulated devices")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise raised(answer["error"])
        return answer

    def _death(self) -> str:
        return death(self._child.wait(), self._log)


def serve(folder: Path, requests: IO[str], answers: IO[str], files: Path) -> None:
    """Load the artifact of a folder, then run one file of feeds for each line of ``requests``."""
    from trivium.backends.xla import generating
    from trivium.backends.xla.worker import error_json, translated
    from trivium.compiler import verify

    def answer(table: Mapping[str, Any]) -> None:
        print(json.dumps(table), file=answers, flush=True)

    try:
        artifact = Artifact.open(folder, checked=False)
        executable = generating.load(artifact, simulated=True)
        answer({"where": executable.where})
        for line in requests:
            (feeds,) = verify.read_samples(files / line.strip())
            verify.write_samples(
                files, "results.npz", verify.outputs_of(artifact, executable, [feeds])
            )
            answer({"ok": True})
    except TriviumError as error:
        answer({"error": error_json(error)})
    except Exception as error:  # jax raises many kinds; the caller gets one line of them
        answer({"error": error_json(translated(error, "simulated devices"))})


if __name__ == "__main__":
    # XLA itself prints to the standard output: the answers get a copy of it, and XLA the log.
    with os.fdopen(os.dup(1), "w") as channel:
        os.dup2(2, 1)
        serve(Path(sys.argv[1]), sys.stdin, channel, Path(sys.argv[2]))
