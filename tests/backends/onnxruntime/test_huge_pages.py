"""What is allocated in the block lies on huge pages, where the system has any."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import threading
from trivium.backends.onnxruntime import huge_pages

def huge():
    with open("/proc/self/smaps_rollup") as stream:
        return next(int(line.split()[1]) for line in stream if line.startswith("AnonHuge"))

def work():
    global kept
    before = huge()
    with huge_pages.heap(64 << 20):
        kept = b"1" * (32 << 20)
    inside = huge()
    outside = b"1" * (64 << 20)
    print(before, inside, huge())

"""


def pages(call: str) -> list[int]:
    """KiB on huge pages before, after an allocation in the block, and after one outside of it."""
    code = CODE + call
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [int(word) for word in done.stdout.split()]


def test_memory_of_the_block_is_on_huge_pages() -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.is_file() or "[madvise]" not in setting.read_text():
        pytest.skip("this system does not give huge pages by advice")
    before, inside, after = pages("work()")
    assert before == 0
    assert inside >= 24 << 10
    assert after == inside


def test_from_another_thread_nothing_happens() -> None:
    if not Path("/proc/self/smaps_rollup").is_file():
        pytest.skip("this system does not tell which pages are huge")
    call = "thread = threading.Thread(target=work)\nthread.start()\nthread.join()"
    assert pages(call) == [0, 0, 0]
