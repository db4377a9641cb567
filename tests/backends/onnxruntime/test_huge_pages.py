"""Weights packed in the block, and caches, lie on huge pages, where the system has any."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import trivium

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


CACHES = """
import sys, trivium

def huge():
    with open("/proc/self/smaps_rollup") as stream:
        return next(int(line.split()[1]) for line in stream if line.startswith("AnonHuge"))

decoder = trivium.load(sys.argv[1]).generator()
before = huge()
cache = decoder.start(8, 512)
decoder.feed(cache, [[5] * 500] * 8)
print(huge() - before, sum(buffer.nbytes for buffer in cache.buffers) >> 10)
"""


def pages(call: str) -> list[int]:
    """KiB on huge pages before, after an allocation in the block, and after one outside of it."""
    code = CODE + call
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [int(word) for word in done.stdout.split()]


@pytest.fixture
def by_advice() -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.is_file() or "[madvise]" not in setting.read_text():
        pytest.skip("this system does not give huge pages by advice")


@pytest.mark.usefixtures("by_advice")
def test_memory_of_the_block_is_on_huge_pages() -> None:
    before, inside, after = pages("work()")
    assert before == 0
    assert inside >= 24 << 10
    assert after == inside


def test_from_another_thread_nothing_happens() -> None:
    if not Path("/proc/self/smaps_rollup").is_file():
        pytest.skip("this system does not tell which pages are huge")
    call = "thread = threading.Thread(target=work)\nthread.start()\nthread.join()"
    assert pages(call) == [0, 0, 0]


@pytest.mark.usefixtures("by_advice")
def test_caches_are_on_huge_pages(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    artifact = trivium.compile(shared_data("llm-shakespeare"), "cpu", out=tmp_path / "out")
    command = [sys.executable, "-c", CACHES, str(artifact.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    gained, held = map(int, done.stdout.split())
    assert held >= 8 << 10
    assert gained >= held // 2
