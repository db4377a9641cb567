"""Reading the records inside of a serialized XLA executable.

XLA wraps its GPU executables in Riegeli records, compressed with Snappy; the machine code is one
field of one record. This reads as much of both formats as that takes: the chunks with records
(not the transposed ones), uncompressed or Snappy. Formats:
https://github.com/google/riegeli/blob/master/doc/riegeli_records_file_format.md and
https://github.com/google/snappy/blob/main/format_description.txt
"""

from __future__ import annotations

import struct

_SIGNATURE = bytes.fromhex("83af70d10d884a3f0000000000000000400000000000000091bac23c9287e1a9")
_BLOCK, _BLOCK_HEADER, _CHUNK_HEADER = 1 << 16, 24, 40
_RECORDS, _WITHOUT_RECORDS = ord("r"), b"smp"
_SNAPPY = ord("s")


def values(data: bytes) -> bytes:
    """Return the concatenated records of the first Riegeli file inside of ``data``.

    Raises:
        ValueError: There is none, it is cut off, or it is compressed in another way.
    """
    start = data.find(_SIGNATURE)
    if start < 0:
        raise ValueError("no Riegeli records")
    stream = _without_block_headers(data[start:])
    found, at = bytearray(), 0
    while at + _CHUNK_HEADER <= len(stream):
        size, _, kind_and_count, _ = struct.unpack_from("<QQQQ", stream, at + 8)
        kind, body = kind_and_count & 0xFF, at + _CHUNK_HEADER
        if kind not in (_RECORDS, *_WITHOUT_RECORDS) or body + size > len(stream):
            # The file's own length is in the message around it: what follows it is no chunk.
            break
        if kind == _RECORDS:
            found += _simple_chunk(stream[body : body + size])
        at = body + size
    if not found:
        raise ValueError("no records that can be read")
    return bytes(found)


def _without_block_headers(data: bytes) -> bytes:
    """A header interrupts the data at every 64 KiB, the very beginning included."""
    blocks = [data[at + _BLOCK_HEADER : at + _BLOCK] for at in range(0, len(data), _BLOCK)]
    return b"".join(blocks)


def _simple_chunk(data: bytes) -> bytes:
    """Decompress the values of a chunk; the sizes of its records are skipped."""
    sizes, at = _varint(data, 1)
    packed = data[at + sizes :]
    if data[0] == 0:
        return packed
    if data[0] != _SNAPPY:
        raise ValueError(f"records compressed with {chr(data[0])!r} are not read")
    length, at = _varint(packed, 0)
    return snappy(packed[at:], length)


def snappy(data: bytes, expected: int | None = None) -> bytes:
    """Decompress a raw Snappy block.

    Args:
        expected: The length that an outer format promises.

    Raises:
        ValueError: Damaged.
    """
    length, at = _varint(data, 0)
    out = bytearray()
    while at < len(data):
        tag = data[at]
        at += 1
        if tag & 3 == 0:
            size = tag >> 2
            if size >= 60:
                extra = size - 59
                size = int.from_bytes(data[at : at + extra], "little")
                at += extra
            out += data[at : at + size + 1]
            at += size + 1
            continue
        if tag & 3 == 1:
            size, offset = (tag >> 2 & 7) + 4, (tag >> 5) << 8 | data[at]
            at += 1
        else:
            width = 2 if tag & 3 == 2 else 4
            size, offset = (tag >> 2) + 1, int.from_bytes(data[at : at + width], "little")
            at += width
        if not 0 < offset <= len(out):
            raise ValueError(f"a copy from {offset} bytes back, after {len(out)}")
        first = len(out) - offset
        # A copy may overlap what it writes: then the last `offset` bytes repeat.
        chunk = out[first : first + size]
        out += (chunk * (size // len(chunk) + 1))[:size]
    if len(out) != length or expected not in (None, length):
        raise ValueError(f"{len(out)} bytes where {expected or length} were promised")
    return bytes(out)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A little-endian base-128 number and the position after it."""
    number = shift = 0
    while True:
        byte = data[at]
        at += 1
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return number, at
