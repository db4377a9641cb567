"""Generating with int4 weights against llama.cpp's Q4_0 and onnxruntime-genai's own int4: processor
time of one pinned thread, each engine in a process of its own, in turn, with and without huge pages
(``GLIBC_TUNABLES=glibc.malloc.hugetlb=1``). Weights are random; speeds do not depend on them.

Peers that are not at hand are left out with the reason: llama.cpp needs ``TRIVIUM_LLAMA_PYTHON``,
an interpreter that has llama-cpp-python; genai's builder needs torch, and a tokenizer's files in
``TRIVIUM_LLM_TOKENIZER``. ``TRIVIUM_LLM_SHAPES`` names the shapes (110M,1.1B). Every run of an
engine is printed on standard error when it ends.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import checkpoints, gguf
from benchmarks.harness import Row, Samples, mebibytes, ratio, seconds
from benchmarks.llm_child import CAPACITY
from benchmarks.streaming_int4 import QUANTIZE_Q4_0
from trivium.compiler.generator import Generator

TITLE = "Generating on the CPU"

ROUNDS = 3
PAGES: Mapping[str, dict[str, str]] = {
    "": {},
    ", huge pages": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
}
FIGURES = {
    "decode128_s": "a token at 128",
    "decode512_s": "a token at 512",
    "prefill_s": "prefill of 512",
    "first_s": "load to first token",
}
GOALS = {
    ("decode128_s", "llama"): 1.0,
    ("decode512_s", "llama"): 1.0,
    ("decode128_s", "genai"): 1 / 1.3,
    ("decode512_s", "genai"): 1 / 1.3,
    ("prefill_s", "genai"): 1 / 1.4,
    ("first_s", "llama"): 1.0,
    ("decode128_s", "llama-plain"): 1.0,
    ("decode512_s", "llama-plain"): 1.0,
}
"""The largest ratio of ours by the peer's."""

PEAK = 1.15
"""Peak memory by that of the weights and the cache, at most."""


@dataclass(frozen=True)
class Contestant:
    """An engine with the model that it runs."""

    engine: str
    title: str
    interpreter: str
    model: Path


def rows() -> list[Row]:
    made = []
    shapes = os.environ.get("TRIVIUM_LLM_SHAPES", "110M,1.1B").split(",")
    with tempfile.TemporaryDirectory(dir=os.environ.get("TRIVIUM_BENCH_DIR")) as name:
        for shape in shapes:
            contestants = _contestants(Path(name), shape)
            for pages, environment in PAGES.items():
                made += _rows(f"{shape}{pages}", contestants, environment)
    return made


def _contestants(folder: Path, shape: str) -> list[Contestant]:
    source = checkpoints.write(folder, shape)
    ours = folder / f"{shape}-trivium"
    subprocess.run(
        [sys.executable, "-m", "trivium.compiler.cli", "compile", str(source), "--target", "cpu",
         "--recipe", "int4", "--no-cache", "-o", str(ours)],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    found = [Contestant("trivium", "ours", sys.executable, ours)]
    llama = os.environ.get("TRIVIUM_LLAMA_PYTHON")
    if llama is None:
        print("llama.cpp: left out (TRIVIUM_LLAMA_PYTHON is not set)", file=sys.stderr)
    else:
        plain, packed = folder / f"{shape}.gguf", folder / f"{shape}-q4.gguf"
        gguf.write(source, plain)
        command = [llama, "-c", QUANTIZE_Q4_0, str(plain), str(packed)]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        plain.unlink()
        found.append(Contestant("llama", "llama.cpp Q4_0", llama, packed))
        # Faster for long caches and slower at prefill.
        plain_title = "llama.cpp Q4_0 without flash attention"
        found.append(Contestant("llama-plain", plain_title, llama, packed))
    built = _built_by_genai(source, folder / f"{shape}-genai")
    if built is not None:
        found.append(Contestant("genai", "genai int4", sys.executable, built))
    return found


def _built_by_genai(source: Path, out: Path) -> Path | None:
    """The checkpoint by genai's own builder, at its default block size and accuracy level 4."""
    tokenizer = os.environ.get("TRIVIUM_LLM_TOKENIZER")
    if tokenizer is None:
        print("genai: left out (TRIVIUM_LLM_TOKENIZER is not set)", file=sys.stderr)
        return None
    for file in Path(tokenizer).glob("tokenizer*"):
        shutil.copy(file, source)
    done = subprocess.run(
        [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o",
         str(out), "-p", "int4", "-e", "cpu", "-c", str(out.with_name("cache")),
         "--extra_options", "int4_accuracy_level=4"],
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        print(f"genai: left out ({done.stderr.strip().splitlines()[-1]})", file=sys.stderr)
        return None
    config = out / "genai_config.json"
    table = json.loads(config.read_text())
    table["model"]["decoder"]["session_options"]["intra_op_num_threads"] = 1
    config.write_text(json.dumps(table))
    return out


def _rows(what: str, contestants: list[Contestant], environment: dict[str, str]) -> list[Row]:
    figures: list[list[dict[str, Any]]] = [[] for _ in contestants]
    for _ in range(ROUNDS):
        for one, kept in zip(contestants, figures, strict=True):
            kept.append(_run(one, environment))
    ours, peers = figures[0], list(zip(contestants, figures, strict=True))[1:]
    made = []
    for key, words in FIGURES.items():
        own = Samples([one[key] for one in ours])
        for peer, theirs in peers:
            other = Samples([one[key] for one in theirs])
            middle, text = ratio(own.seconds, other.seconds)
            goal = GOALS.get((key, peer.engine))
            made.append(
                Row(f"{what}: {words}", seconds(own), f"{peer.title} {seconds(other)}", text,
                    f"at most {goal:.2f}" if goal else "", middle <= goal if goal else None)
            )  # fmt: skip
        if not peers:
            made.append(Row(f"{what}: {words}", seconds(own), "no peer here", ""))
    peak = Samples(peak_bytes=[one["peak_bytes"] for one in ours]).peak
    weights = sum(file.stat().st_size for file in contestants[0].model.glob("*.data"))
    manifest = json.loads((contestants[0].model / "manifest.json").read_text())
    per_token = Generator.from_json(manifest["generator"]).bytes_per_token
    held = weights + CAPACITY * per_token
    others = "; ".join(
        f"{p.title} {mebibytes(Samples(peak_bytes=[one['peak_bytes'] for one in t]).peak)}"
        for p, t in peers
    )
    ours_words = f"{mebibytes(peak)} with {mebibytes(held)} of weights and cache"
    bar = f"at most {PEAK:.2f} of weights and cache"
    made.append(
        Row(f"{what}: peak memory", ours_words, others, f"{peak / held:.2f}", bar,
            peak / held <= PEAK)
    )  # fmt: skip
    return made


def _run(one: Contestant, environment: dict[str, str]) -> dict[str, Any]:
    child = Path(__file__).with_name("llm_child.py")
    done = subprocess.run(
        [one.interpreter, str(child), one.engine, str(one.model)],
        check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment},
    )  # fmt: skip
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{one.title}: {figures}", file=sys.stderr, flush=True)
    return figures
