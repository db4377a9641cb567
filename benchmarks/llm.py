"""Generating with int4 weights against llama.cpp's Q4_0, onnxruntime-genai's own int4, and OpenVINO
with weights by NNCF: processor time of one pinned thread (wall time of two where a row says so);
each engine in a process of its own, in turn, with and without huge pages for the peers
(``GLIBC_TUNABLES=glibc.malloc.hugetlb=1``). Weights of the shapes are random; speeds do not depend
on them. Perplexity is that of the trained model. llama.cpp is built native, but without AMX, which
this machine announces and does not let be used. OpenVINO runs our stateful graph by its own
settings, with caches of 8 bits. Before each engine, memory is taken and given back: the host of a
virtual machine may have to provide it anew, which costs 2 s a GiB whoever comes first, and times
of loading still hold some of that. Python files are compiled beforehand, as installers do. A range
that is a point was measured once.

Peers that are not at hand are left out with the reason: llama.cpp needs ``TRIVIUM_LLAMA_PYTHON``,
an interpreter that has llama-cpp-python; NNCF ``TRIVIUM_NNCF_PYTHON``; genai's builder needs torch,
and a tokenizer's files in ``TRIVIUM_LLM_TOKENIZER``. ``TRIVIUM_LLM_SHAPES`` names the shapes
(110M,1.1B). Models are kept in ``TRIVIUM_BENCH_DIR``, if that is set, and made if they are not
there. A long run goes in pieces (`pieces`), one for each round of a shape; a piece holds a run of
every engine, in turn.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import trivium
from benchmarks.harness import Row, Samples, mebibytes, ratio, seconds
from benchmarks.llm_child import CAPACITY, COPIED
from benchmarks.llm_models import OURS, Contestant, contestants
from benchmarks.pieces import Pieces
from benchmarks.workloads import shared
from trivium.compiler.generator import Generator

TITLE = "Generating on the CPU"

ROUNDS = 3
TRAINED = "Shakespeare, 3.4M"
SETTINGS: Mapping[str, tuple[int, dict[str, str]]] = {
    "": (1, {}),
    ", huge pages": (1, {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}),
    ", two threads": (2, {}),
}
"""Threads, and what is added to the environment."""

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

PEERS = {"ours": ("llama", "llama-plain", "genai", "nncf"), "ours8": ("llama", "genai8", "nncf")}
"""Whom ours are held to: with caches of the same bits where the peer can."""

PEAK = 1.15
"""Peak memory by that of the weights and the cache, at most."""

MEMORY = 3 << 29
"""Bytes that are taken and given back before an engine starts: what it may ask for at once."""

_TAKE = """
import mmap, sys
block = mmap.mmap(-1, int(sys.argv[1]), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
if hasattr(mmap, "MADV_HUGEPAGE"):
    block.madvise(mmap.MADV_HUGEPAGE)
block[::mmap.PAGESIZE] = b"1" * (len(block) // mmap.PAGESIZE)
"""

COPIES = 1 / 1.5
"""Text that copies, guessed, by llama.cpp's time one by one, at most."""


def rows() -> list[Row]:
    made: list[Row] = []
    _compile_python()
    pieces = Pieces("llm")
    shapes = os.environ.get("TRIVIUM_LLM_SHAPES", "110M,1.1B").split(",")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(os.environ.get("TRIVIUM_BENCH_DIR") or name)
        for shape in shapes:
            for words, (threads, environment) in SETTINGS.items():
                what = f"{shape}{words}"
                rounds = _rounds(what, folder, shape, pieces, threads, environment)
                if rounds:
                    made += _speeds(what, rounds, threads)
                if rounds and threads == 1:
                    made += _peaks(what, rounds)
            made += _copying(shape, folder, pieces)
        if shared("llm-shakespeare") is not None:
            made += _copying(TRAINED, folder, pieces)
            made += _quality(folder, pieces)
    return made


def _rounds(
    what: str,
    folder: Path,
    shape: str,
    pieces: Pieces,
    threads: int,
    environment: Mapping[str, str],
) -> list[dict[str, Any]]:
    """The figures of every engine by round: {engine: figures}."""

    def measure() -> dict[str, Any]:
        return {
            one.engine: _run(one, "speed", threads, environment)
            for one in contestants(folder, shape)
        }

    found = [pieces.of(f"{what}/{number}", measure) for number in range(ROUNDS)]
    return [one for one in found if one is not None]


def _speeds(what: str, rounds: Sequence[Mapping[str, Any]], threads: int) -> list[Row]:
    made = []
    for own, peers in PEERS.items():
        for key, words in FIGURES.items():
            mine = [one[own] for one in rounds if own in one]
            if key not in (mine[0] if mine else ()):
                continue
            ours = Samples([one[key] for one in mine])
            there = [peer for peer in peers if peer in rounds[0]]
            for peer in there:
                theirs = Samples([one[peer][key] for one in rounds])
                middle, text = ratio(ours.seconds, theirs.seconds)
                goal = GOALS.get((key, peer)) if threads == 1 else None
                made.append(
                    Row(f"{what}: {words}", f"{OURS[own]}{seconds(ours)}",
                        f"{_title(peer)} {seconds(theirs)}", text,
                        f"at most {goal:.2f}" if goal else "", middle <= goal if goal else None)
                )  # fmt: skip
            if not there:
                made.append(
                    Row(f"{what}: {words}", f"{OURS[own]}{seconds(ours)}", "no peer here", "")
                )
    made += _by_openvino(what, rounds)
    return made


def _by_openvino(what: str, rounds: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Our artifact of the other backend against that of ONNX Runtime."""
    made = []
    for key, words in FIGURES.items():
        pairs = [(one["openvino"].get(key), one["ours"].get(key)) for one in rounds
                 if "openvino" in one]  # fmt: skip
        if not pairs or None in pairs[0]:
            continue
        ours, peer = (Samples(list(values)) for values in zip(*pairs, strict=True))
        _, text = ratio(ours.seconds, peer.seconds)
        made.append(
            Row(f"{what}: {words}", f"{OURS['openvino']}{seconds(ours)}",
                f"ours by ONNX Runtime {seconds(peer)}", text)
        )  # fmt: skip
    return made


def _peaks(what: str, rounds: Sequence[Mapping[str, Any]]) -> list[Row]:
    def peak(engine: str) -> float:
        return Samples(peak_bytes=[one[engine]["peak_bytes"] for one in rounds]).peak

    made = []
    for own, peers in PEERS.items():
        if own not in rounds[0]:
            continue
        held = rounds[0][own]["held_bytes"]
        others = [f"{_title(p)} {mebibytes(peak(p))}" for p in peers if p in rounds[0]]
        words = f"{OURS[own]}{mebibytes(peak(own))} with {mebibytes(held)} of weights and cache"
        bar = f"at most {PEAK:.2f} of weights and cache"
        made.append(
            Row(f"{what}: peak memory", words, "; ".join(others), f"{peak(own) / held:.2f}", bar,
                peak(own) / held <= PEAK)
        )  # fmt: skip
    return made


def _copying(shape: str, folder: Path, pieces: Pieces) -> list[Row]:
    """Greedy text that goes on as its prompt did, with tokens guessed and without."""

    def measure() -> dict[str, Any]:
        found: dict[str, Any] = {}
        for one in contestants(folder, shape):
            if one.engine in ("ours", "llama", "llama-plain"):
                found[one.engine] = _run(one, "copy", 1, {})
        return found

    rounds = [pieces.of(f"{shape}: copying/{number}", measure) for number in range(ROUNDS)]
    rounds = [one for one in rounds if one is not None]
    if not rounds:
        return []
    ours = Samples([one["ours"]["guessed_s"] for one in rounds])
    share = rounds[0]["ours"]
    words = f"{COPIED} tokens after a prompt that repeats"
    copies = share["accepted"] >= COPIED / 4  # otherwise the text goes on as it likes
    told = f"guessed {seconds(ours)}, {share['accepted']} of {share['guessed']} guesses came true"
    made = []
    plain = Samples([one["ours"]["plain_s"] for one in rounds])
    _, text = ratio(ours.seconds, plain.seconds)
    made.append(Row(f"{shape}: {words}", told, f"ours without look-up {seconds(plain)}", text))
    for peer in ("llama", "llama-plain"):
        if peer in rounds[0]:
            theirs = Samples([one[peer]["plain_s"] for one in rounds])
            middle, text = ratio(ours.seconds, theirs.seconds)
            made.append(
                Row(f"{shape}: {words}", told, f"{_title(peer)} one by one {seconds(theirs)}", text,
                    f"at most {COPIES:.2f}" if copies else "", middle <= COPIES if copies else None)
            )  # fmt: skip
    return made


def _quality(folder: Path, pieces: Pieces) -> list[Row]:
    def measure() -> dict[str, Any]:
        return {
            one.engine: _run(one, "quality", 1, {})["perplexity"]
            for one in contestants(folder, TRAINED)
            if one.engine != "llama-plain"
        }

    found = pieces.of(f"{TRAINED}: perplexity", measure)
    if found is None:
        return []
    pairs = [(own, peer) for own, peers in PEERS.items() for peer in peers]
    return [
        Row(f"{TRAINED}: perplexity", f"{OURS[own]}{found[own]:.2f}",
            f"{_title(peer)} {found[peer]:.2f}", f"{found[own] / found[peer]:.3f}")
        for own, peer in [*pairs, ("openvino", "llama")]
        if own in found and peer in found
    ]  # fmt: skip


def _title(engine: str) -> str:
    return {
        "llama": "llama.cpp Q4_0",
        # Faster for long caches and slower at prefill.
        "llama-plain": "llama.cpp Q4_0 without flash attention",
        "genai": "genai int4",
        "genai8": "genai int4, caches int8",
        "nncf": "OpenVINO int4 by NNCF, caches u8",
    }[engine]


def _run(
    one: Contestant, what: str, threads: int, environment: Mapping[str, str]
) -> dict[str, Any]:
    child = Path(__file__).with_name("llm_child.py")
    for file in one.model.rglob("*") if one.model.is_dir() else (one.model,):
        _warm(file)
    if one.kind == "trivium":
        trivium.Artifact.open(one.model)  # its checksums are known then, as after any first load
    _take_memory()
    done = subprocess.run(
        [one.interpreter, str(child), what, one.kind, str(one.model), str(threads)],
        check=False, capture_output=True, text=True, env={**os.environ, **environment},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{one.engine}: {done.stderr[-1000:] or done.returncode}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if one.kind == "trivium" and what == "speed":
        weights = sum(file.stat().st_size for file in one.model.glob("*.data"))
        weights += sum(file.stat().st_size for file in one.model.glob("*.bin"))
        manifest = json.loads((one.model / "manifest.json").read_text())
        per_token = Generator.from_json(manifest["generator"]).bytes_per_token
        figures["held_bytes"] = weights + CAPACITY * per_token
    print(f"{one.engine}: {figures}", file=sys.stderr, flush=True)
    return figures


def _compile_python() -> None:
    """Compile our Python files, which otherwise would be compiled at every start of a checkout."""
    root = Path(trivium.__file__).parent
    folders = {(root / name).resolve() for name in ("backends", "compiler")}
    command = [sys.executable, "-m", "compileall", "-q", str(root), *map(str, sorted(folders))]
    subprocess.run(command, check=True)


def _take_memory() -> None:
    """Take memory in huge pages, write to all of it, and give it back.

    In processes of their own: the peak of one counts for those that it starts. Twice: what comes
    next may be given other memory than what was given back last.
    """
    for _ in range(2):
        subprocess.run([sys.executable, "-c", _TAKE, str(MEMORY)], check=True)


def _warm(file: Path) -> None:
    """Read a file, so that no engine waits for the disk."""
    if file.is_file():
        with file.open("rb") as stream:
            while stream.read(8 << 20):
                pass
