"""int4 from safetensors in a stream (``trivium optimize CHECKPOINT --recipe int4``): peak memory
over that of the same command on a tiny checkpoint, and processor seconds by billion weights, for
Llama shapes with random weights. The peer is llama-quantize's library call to Q4_0 where
llama-cpp-python is installed in the environment that ``TRIVIUM_LLAMA_PYTHON`` names, in turn."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import checkpoints
from benchmarks.harness import Row, Samples, mebibytes, python, ratio, run_command, seconds
from benchmarks.pieces import Pieces

TITLE = "Streaming int4"

SHAPES = ("1.1B", "7B")
PEERED = ("1.1B",)
"""Shapes that llama-quantize gets too, in turn."""

RUNS = int(os.environ.get("TRIVIUM_BENCH_RUNS", "3"))
INTERPRETER = os.environ.get("TRIVIUM_LLAMA_PYTHON")
LIMIT = 256e6

_OURS = """
import sys
from trivium.compiler.cli import main
sys.exit(main(["optimize", sys.argv[1], "--recipe", "int4", "-o", sys.argv[2]]))
"""

QUANTIZE_Q4_0 = """
import sys, llama_cpp
params = llama_cpp.llama_model_quantize_default_params()
params.nthread, params.ftype = 1, llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
source, out = (name.encode() for name in sys.argv[1:])
sys.exit(llama_cpp.llama_model_quantize(source, out, params))
"""


def rows() -> list[Row]:
    made = []
    pieces = Pieces("streaming_int4")
    with tempfile.TemporaryDirectory(dir=os.environ.get("TRIVIUM_BENCH_DIR")) as name:
        folder = Path(name)
        bare = _samples([pieces.of("1M", partial(_ours, folder, "1M"))])
        for shape in SHAPES:
            ours, theirs = [], []
            for run in range(RUNS if shape in PEERED else 1):
                ours.append(pieces.of(f"{shape}/run {run}", partial(_ours, folder, shape)))
                if shape in PEERED and INTERPRETER is not None:
                    measure = partial(_peer, folder, shape, INTERPRETER)
                    theirs.append(pieces.of(f"{shape}/llama-quantize/run {run}", measure))
            if bare is not None and (whole := _samples(ours)) is not None:
                made += _rows(shape, bare, whole, _samples(theirs))
            for file in (*(folder / shape).glob("*"), *folder.glob(f"{shape}.*")):
                if file.is_file():
                    file.unlink()
    if INTERPRETER is None:
        print("llama-quantize: left out (TRIVIUM_LLAMA_PYTHON is not set)", file=sys.stderr)
    return made


def _rows(shape: str, bare: Samples, whole: Samples, peer: Samples | None) -> list[Row]:
    over = whole.peak - bare.peak
    billions = checkpoints.SHAPES[shape].parameters / 1e9
    each = [Samples([s / billions for s in x.seconds]) for x in (whole, peer) if x is not None]
    share, words = ratio(whole.seconds, peer.seconds) if peer is not None else (None, "")
    return [
        Row(f"{shape}: peak memory", f"{mebibytes(over)} over {mebibytes(bare.peak)}",
            f"llama-quantize {mebibytes(peer.peak)}" if peer else "not here", "",
            "under 256 MB over", over < LIMIT),
        Row(f"{shape}: processor time, 1e9 weights", seconds(each[0]),
            f"llama-quantize {seconds(each[1])}" if peer else "not here",
            words, "at most 1.0", share <= 1 if share is not None else None),
    ]  # fmt: skip


def _samples(figures: Sequence[dict[str, Any] | None]) -> Samples | None:
    """The runs of a thing; None where one was not asked for, or there are none."""
    found = [one for one in figures if one is not None]
    if not found or len(found) < len(figures):
        return None
    return Samples([one["seconds"] for one in found], [one["peak_bytes"] for one in found])


def _ours(folder: Path, shape: str) -> dict[str, Any]:
    source, out = checkpoints.write(folder, shape), folder / f"{shape}.onnx"
    return _run(python(_OURS, str(source), str(out)), [out, Path(f"{out}.data")])


def _peer(folder: Path, shape: str, interpreter: str) -> dict[str, Any]:
    """The same weights by llama-quantize."""
    from benchmarks import gguf

    source, out = folder / f"{shape}.gguf", folder / f"{shape}.q4.gguf"
    if not source.is_file():
        gguf.write(checkpoints.write(folder, shape), source)
    return _run([interpreter, "-c", QUANTIZE_Q4_0, str(source), str(out)], [out])


def _run(command: list[str], made: Sequence[Path]) -> dict[str, Any]:
    samples = Samples()
    run_command(command, samples, cpu=True)
    for file in made:
        # Both write where no file is.
        file.unlink(missing_ok=True)
    return {"seconds": samples.seconds[0], "peak_bytes": samples.peak_bytes[0]}
