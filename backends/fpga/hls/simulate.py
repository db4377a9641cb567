"""Running the emitted kernel on this machine: g++ compiles it with its own test bench."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trivium.compiler.checksums import file_hash
from trivium.compiler.errors import BackendFailed, ToolchainMissing

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

SOURCES = ("hls/tb.cpp", "hls/kernel.cpp")
HEADERS = (
    "hls/kernel.h",
    "hls/layers.h",
    "hls/weights.h",
    "hls/golden.h",
    "sim/ap_int.h",
    "sim/hls_stream.h",
)
FLAGS = ("-std=c++17", "-O2", "-Wno-unknown-pragmas", "-Isim", "-Ihls")
COMPILE_SECONDS = 600
RUN_SECONDS = 600


def compiler() -> str:
    """The path of g++. Raises ``ToolchainMissing``."""
    found = shutil.which(os.environ.get("CXX", "g++"))
    if found is None:
        raise ToolchainMissing(
            "g++ is not installed, and the HLS kernel is simulated with it",
            about="backend fpga",
            remedy="install it with: apt install g++",
        )
    return found


def compile_bench(folder: Path) -> Path:
    """Compile a project's kernel and test bench, once for the same sources.

    Returns:
        The program, in a folder for temporary files.

    Raises:
        ToolchainMissing: There is no g++.
        BackendFailed: It refuses the sources.
    """
    import hashlib

    tool = compiler()
    key = hashlib.sha256(" ".join((tool, *FLAGS)).encode())
    for name in (*SOURCES, *HEADERS):
        key.update(file_hash(folder / name).encode())
    place = Path(tempfile.gettempdir()) / f"trivium-fpga-{os.getuid()}"
    place.mkdir(mode=0o700, exist_ok=True)
    if place.is_symlink() or place.stat().st_uid != os.getuid():
        raise BackendFailed("belongs to someone else", about=str(place), remedy="set TMPDIR")
    program = place / key.hexdigest()[:32]
    if program.is_file():
        return program
    with tempfile.TemporaryDirectory(dir=place) as staging:
        built = Path(staging) / "tb"
        _run([tool, *FLAGS, "-o", str(built), *SOURCES], folder, COMPILE_SECONDS)
        built.replace(program)
    return program


def check_golden(program: Path, folder: Path) -> str:
    """Run the test bench on its golden data.

    Returns:
        What it printed.

    Raises:
        BackendFailed: An output differs: the C++ does not compute what the IR says.
    """
    return _run([str(program)], folder, RUN_SECONDS)


def run(program: Path, inputs: Sequence[Array], outputs: Sequence[tuple[str, int]]) -> list[Array]:
    """Run the kernel on frames.

    Args:
        program: Of `compile_bench`.
        inputs: For each input port integers ``[frames, height, width, channels]`` of its memory
            dtype.
        outputs: For each output port its memory dtype and the number of values of a frame.

    Returns:
        For each output port ``[frames, values]``.
    """
    import numpy as np

    frames = len(inputs[0])
    with tempfile.TemporaryDirectory(prefix="trivium-") as folder:
        sent = [str(Path(folder) / f"in{i}.bin") for i in range(len(inputs))]
        received = [str(Path(folder) / f"out{i}.bin") for i in range(len(outputs))]
        for path, array in zip(sent, inputs, strict=True):
            np.ascontiguousarray(array).tofile(path)
        _run([str(program), str(frames), *sent, *received], Path(folder), RUN_SECONDS)
        return [
            np.fromfile(path, dtype).reshape(frames, size)
            for path, (dtype, size) in zip(received, outputs, strict=True)
        ]


def _run(command: Sequence[str], folder: Path, seconds: int) -> str:
    name = Path(command[0]).name
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise BackendFailed(f"still running after {seconds} s", about=name) from error
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().split("\n")[:4]
        raise BackendFailed(
            f"exit code {done.returncode}: {' / '.join(said)}",
            about=f"simulation of the HLS kernel ({name})",
        )
    return done.stdout
