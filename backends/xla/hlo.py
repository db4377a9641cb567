"""What the compiler's own output says of a program: the collectives in the optimized HLO, the
machine code in a GPU executable. Text and bytes in, numbers out; nothing here needs jax.
"""

from __future__ import annotations

import re
import struct
from math import prod

_COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
_CALL = re.compile(
    rf"^\s*(?:ROOT )?%?\S+ = (?P<type>.*?) (?P<op>{'|'.join(_COLLECTIVES)})(?P<start>-start)?\(",
    re.MULTILINE,
)
_ARRAY = re.compile(r"(?P<dtype>pred|bf16|[sufc]\d+(?:e\w+)?)\[(?P<dims>[\d,]*)\]")
_FLAG_BYTES = 4
_LOOP = re.compile(r"\bwhile\(")


def collectives(text: str) -> dict[str, dict[str, int]]:
    """Count the collectives of an optimized HLO module.

    Returns:
        For each kind its ``count`` (an asynchronous pair is one) and the ``bytes`` that its
        results take on one device. One inside of a loop counts once.
    """
    found: dict[str, dict[str, int]] = {}
    for match in _CALL.finditer(text):
        arrays = [_bytes(array) for array in _ARRAY.finditer(match["type"])]
        # The type of a -start is a tuple: operands, results, then flags, which are scalars.
        if match["start"]:
            arrays = [size for size in arrays if size > _FLAG_BYTES][-1:]
        size = sum(arrays)
        entry = found.setdefault(match["op"], {"count": 0, "bytes": 0})
        entry["count"] += 1
        entry["bytes"] += size
    return found


def _bytes(array: re.Match[str]) -> int:
    dims = prod(int(dim) for dim in array["dims"].split(",") if dim)
    digits = re.match(r"\D+(\d+)", array["dtype"])
    bits = int(digits[1]) if digits else 8
    return dims * bits // 8 if bits % 8 == 0 else -(-dims * bits // 8)


def has_loop(text: str) -> bool:
    """Whether a module loops, so that counts made on its text are lower bounds."""
    return _LOOP.search(text) is not None


_ELF = b"\x7fELF\x02\x01\x01"
_EM_CUDA = 190


def cubins(executable: bytes) -> list[bytes]:
    """Return the CUDA machine code (ELF images) inside of a serialized GPU executable."""
    found = []
    at = executable.find(_ELF)
    while at >= 0:
        size = _elf_size(executable, at)
        if size:
            found.append(executable[at : at + size])
        at = executable.find(_ELF, at + max(size, 1))
    return found


def _elf_size(data: bytes, at: int) -> int:
    """The length of a 64-bit CUDA ELF image, or 0 if it is none or is cut off."""
    if len(data) < at + 64:
        return 0
    machine = struct.unpack_from("<H", data, at + 18)[0]
    if machine != _EM_CUDA:
        return 0
    programs, sections = struct.unpack_from("<QQ", data, at + 32)
    program_size, program_count, section_size, section_count = struct.unpack_from(
        "<HHHH", data, at + 54
    )
    end = max(
        programs + program_size * program_count if programs else 0,
        sections + section_size * section_count if sections else 0,
    )
    return end if at + end <= len(data) else 0


def compute_capability(cubin: bytes) -> int:
    """Return the architecture of a cubin: 90 for sm_90.

    CUDA keeps it in the ELF header's flags: in the second byte since ABI version 8 (CUDA 13), in
    the lowest one before.
    """
    flags = int(struct.unpack_from("<I", cubin, 48)[0])
    return (flags >> 8) & 0xFF if cubin[8] >= 8 else flags & 0xFF
