"""CUDA kernels as a cubin, made by nvcc from what TVM generates, on a machine with no GPU.

Without a CUDA runtime TVM's library silently holds the kernels as source. So the source is taken
out, compiled here, and the result is read back: an ELF for the right architecture with a section
for every kernel, or there is no artifact.
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trivium.compiler.errors import BackendFailed, ToolchainMissing

SOURCE, CUBIN = "kernels.cu", "kernels.cubin"
_EM_CUDA = 190
_NVCC_SECONDS = 900


@dataclass(frozen=True)
class Cubin:
    """What a cubin says of itself: ``sm`` (90 for an H100) and the kernels that it holds."""

    sm: int
    kernels: tuple[str, ...]


def find_nvcc() -> str:
    """Return the path of nvcc, or raise ``ToolchainMissing``."""
    found = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if found is None:
        raise ToolchainMissing(
            "nvcc is not on this machine",
            about="backend tvm",
            remedy="install the CUDA toolkit and put its bin folder on PATH",
        )
    return found


def kernel_source(executable: Any) -> str:
    """Return the CUDA source in a module that TVM built.

    Raises:
        BackendFailed: There is none, that is, nothing was scheduled for the GPU.
    """
    pending = list(executable.mod.imports)
    while pending:
        module = pending.pop()
        if module.kind == "cuda":
            return str(module.inspect_source(""))
        pending.extend(module.imports)
    raise BackendFailed("the build holds no CUDA kernel", about="tvm")


def compile_cubin(source: Path, cubin: Path, arch: str) -> Cubin:
    """Compile CUDA source for one architecture (``sm_90``) and check what came out.

    Raises:
        ToolchainMissing: There is no nvcc, or it does not know the architecture.
        BackendFailed: nvcc rejects the source, or its output is not what was asked for.
    """
    nvcc = find_nvcc()
    command = [nvcc, "-cubin", f"-arch={arch}", "-O3", "-std=c++17", "-w"]
    try:
        done = subprocess.run(
            [*command, str(source), "-o", str(cubin)],
            capture_output=True,
            text=True,
            timeout=_NVCC_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise BackendFailed(f"no result after {_NVCC_SECONDS} s", about="nvcc") from error
    if done.returncode:
        reason = next((line for line in done.stderr.splitlines() if line.strip()), "no message")
        if "gpu architecture" in done.stderr:
            raise ToolchainMissing(
                f"this nvcc does not know {arch} ({reason})",
                about="nvcc",
                remedy="install a newer CUDA toolkit",
            )
        raise BackendFailed(reason, about="nvcc")
    made = read_cubin(cubin.read_bytes())
    if made.sm != int(re.sub(r"\D", "", arch)):
        raise BackendFailed(f"wrote code for sm_{made.sm}, not {arch}", about="nvcc")
    declared = set(
        re.findall(r"__global__ void (?:__launch_bounds__\(\d+\) )?(\w+)\(", source.read_text())
    )
    missing = declared - set(made.kernels)
    if missing or not declared:
        raise BackendFailed(
            f"the cubin lacks kernels: {', '.join(sorted(missing)) or 'all'}", about="nvcc"
        )
    return made


def read_cubin(data: bytes) -> Cubin:
    """Read architecture and kernel names from a cubin (ELF64, one ``.text.<kernel>`` for each).

    Raises:
        BackendFailed: Not a CUDA ELF.
    """
    if data[:5] != b"\x7fELF\x02" or struct.unpack_from("<H", data, 18)[0] != _EM_CUDA:
        raise BackendFailed("not a cubin", about=CUBIN)
    (flags,) = struct.unpack_from("<I", data, 48)
    # Since CUDA 13 (ELF ABI 8, byte 7 = 0x41) the architecture is in the second byte of the flags.
    sm = (flags >> 8) & 0xFF if data[7] == 0x41 else flags & 0xFF
    (table,) = struct.unpack_from("<Q", data, 40)
    size, count, names = struct.unpack_from("<HHH", data, 58)
    (strings,) = struct.unpack_from("<Q", data, table + names * size + 24)
    kernels = []
    for section in range(count):
        (name_at,) = struct.unpack_from("<I", data, table + section * size)
        name = data[strings + name_at : data.index(b"\0", strings + name_at)].decode()
        if name.startswith(".text."):
            kernels.append(name.removeprefix(".text."))
    return Cubin(sm, tuple(kernels))
