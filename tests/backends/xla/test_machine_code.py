"""Reading what the compilers wrote: HLO text and the records inside of a GPU executable."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trivium.backends.xla import hlo, riegeli

# What XLA printed for a tensor-parallel block on a v5e slice, shortened.
HLO = """
ENTRY %main {
  %ar = f32[4,128]{1,0:T(4,128)} all-reduce(%x), channel_id=1, replica_groups=[1,4]<=[4]
  %ags = (bf16[8,16]{1,0}, bf16[32,16]{1,0}) all-gather-start(%y), dimensions={0}
  %rs = ((f32[64,8]{1,0}), f32[16,8]{1,0}, u32[], u32[]) reduce-scatter-start(%z), channel_id=3
  %agd = bf16[32,16]{1,0} all-gather-done(%ags)
  ROOT %two = (s8[10]{0}, pred[3]{0}) all-to-all(%a, %b)
  %fusion = f32[4] fusion(%all-reduce.1), kind=kLoop
}
"""


def test_collectives_are_counted_once_with_their_bytes() -> None:
    assert hlo.collectives(HLO) == {
        "all-reduce": {"count": 1, "bytes": 4 * 128 * 4},
        "all-gather": {"count": 1, "bytes": 32 * 16 * 2},
        "all-to-all": {"count": 1, "bytes": 13},
        "reduce-scatter": {"count": 1, "bytes": 16 * 8 * 4},
    }
    assert hlo.collectives("%x = f32[2] add(%a, %b)") == {}


def test_loops_are_seen() -> None:
    assert hlo.has_loop("%w = (s32[], f32[2]) while(%init), condition=%c, body=%b")
    assert not hlo.has_loop(HLO)


def _literal(data: bytes) -> bytes:
    """A Snappy literal, its length in the tag or in the two bytes after it."""
    size = len(data) - 1
    tag = bytes([size << 2]) if size < 60 else bytes([61 << 2]) + struct.pack("<H", size)
    return tag + data


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


@given(
    st.binary(min_size=1, max_size=300),
    st.lists(st.tuples(st.integers(1, 300), st.integers(1, 64)), max_size=8),
)
def test_snappy_literals_and_overlapping_copies(
    start: bytes, copies: list[tuple[int, int]]
) -> None:
    packed, plain = _literal(start), bytearray(start)
    for back, size in copies:
        offset = min(back, len(plain))
        packed += bytes([(size - 1) << 2 | 2]) + struct.pack("<H", offset)
        for _ in range(size):
            plain.append(plain[-offset])
    assert riegeli.snappy(_varint(len(plain)) + packed) == plain


def test_damaged_snappy_is_an_error() -> None:
    with pytest.raises(ValueError, match="a copy from 9 bytes back, after 1"):
        riegeli.snappy(b"\x05" + _literal(b"a") + bytes([3 << 2 | 2]) + struct.pack("<H", 9))
    with pytest.raises(ValueError, match="1 bytes where 2 were promised"):
        riegeli.snappy(b"\x02" + _literal(b"a"))
    with pytest.raises(ValueError, match="no Riegeli records"):
        riegeli.values(b"nothing of the kind")


def test_an_elf_of_another_machine_is_no_cubin() -> None:
    with open("/proc/self/exe", "rb") as stream:
        assert hlo.cubins(stream.read(1 << 20)) == []
