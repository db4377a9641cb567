"""int4 from safetensors in a stream (``trivium optimize CHECKPOINT --recipe int4``): peak memory
over that of the same command on a tiny checkpoint, and processor seconds by billion weights, for
Llama shapes with random weights. The peer is llama-quantize's library call to Q4_0 where
llama-cpp-python is installed in the environment that ``TRIVIUM_LLAMA_PYTHON`` names."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from benchmarks import checkpoints
from benchmarks.harness import Row, Samples, mebibytes, python, run_command, seconds

TITLE = "Streaming int4"

SHAPES = ("1.1B", "7B")
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
    with tempfile.TemporaryDirectory(dir=os.environ.get("TRIVIUM_BENCH_DIR")) as name:
        folder = Path(name)
        bare = Samples()
        tiny = checkpoints.write(folder, "1M")
        run_command(python(_OURS, str(tiny), f"{folder}/tiny.onnx"), bare)
        for shape in SHAPES:
            source, whole = checkpoints.write(folder, shape), Samples()
            run_command(python(_OURS, str(source), f"{folder}/{shape}.onnx"), whole, cpu=True)
            over = whole.peak - bare.peak
            billions = checkpoints.SHAPES[shape].parameters / 1e9
            peer = _peer(folder, shape)
            each = (whole.median / billions, peer.median / billions if peer else None)
            made += [
                Row(f"{shape}: peak memory", f"{mebibytes(over)} over {mebibytes(bare.peak)}",
                    f"llama-quantize {mebibytes(peer.peak)}" if peer else "not here", "",
                    "under 256 MB over", over < LIMIT),
                Row(f"{shape}: processor time, 1e9 weights", f"{each[0]:.1f} s",
                    f"llama-quantize {each[1]:.1f} s" if each[1] else "not here",
                    f"{each[0] / each[1]:.2f}" if each[1] else "", "at most 1.0",
                    each[0] <= each[1] if each[1] else None),
            ]  # fmt: skip
            for file in (*source.glob("*"), *folder.glob(f"{shape}.*")):
                if file.is_file():
                    file.unlink()
    return made


def _peer(folder: Path, shape: str) -> Samples | None:
    """The same weights by llama-quantize, or None with the reason on standard error."""
    interpreter = os.environ.get("TRIVIUM_LLAMA_PYTHON")
    if interpreter is None or shape != "1.1B":
        print("llama-quantize: left out (TRIVIUM_LLAMA_PYTHON is not set)", file=sys.stderr)
        return None
    from benchmarks import gguf

    source = gguf.write(folder / shape, folder / f"{shape}.gguf")
    samples = Samples()
    command = [interpreter, "-c", QUANTIZE_Q4_0, str(source), str(folder / f"{shape}.q4.gguf")]
    run_command(command, samples, cpu=True)
    print(f"llama-quantize: {seconds(samples)}", file=sys.stderr)
    return samples
