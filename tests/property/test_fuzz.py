"""Real models with bytes changed at random: each is answered, without a crash or a hang.

The mutations are drawn from a fixed seed. One child process works through them under an alarm and
a bound on its memory; a crash or a hang then shows as the mutation that is left without an answer.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

MODELS = ("mnist_cnn_cntk.onnx", "silero_vad_16k_op15.onnx", "conv_int4_qdq.onnx")
COUNT = 200
DEADLINE = 30
MEMORY = 6 << 30

CHILD = """
import json, resource, signal, sys, tempfile
from pathlib import Path
import trivium
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]),) * 2)
for path in sorted(Path(sys.argv[3]).iterdir())[int(sys.argv[4]):]:
    signal.alarm(int(sys.argv[1]))
    try:
        with tempfile.TemporaryDirectory() as folder:
            trivium.compile(path, "cpu", out=Path(folder) / "out", use_cache=False)
        answer = [0, ""]
    except trivium.TriviumError as error:
        answer = [error.exit_code, str(error)]
    except Exception as error:
        answer = [-1, f"{type(error).__name__}: {error}"]
    print(json.dumps([path.name, *answer]), flush=True)
"""


def _mutated(data: bytes, rng: random.Random) -> bytes:
    """Change a few bytes: half of the time where the graph is described, else anywhere."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(min(len(changed), rng.choice((4000, len(changed)))) or 1)
        match rng.choice(("flip", "flip", "byte", "byte", "cut", "repeat", "zero", "ones", "end")):
            case "flip":
                changed[at : at + 1] = bytes(
                    b ^ 1 << rng.randrange(8) for b in changed[at : at + 1]
                )
            case "byte":
                changed[at : at + 1] = bytes([rng.randrange(256)])
            case "cut":
                del changed[at : at + rng.randrange(1, 30)]
            case "repeat":
                changed[at:at] = changed[at : at + rng.randrange(1, 60)]
            case "zero":
                changed[at : at + 8] = bytes(8)
            case "ones":
                changed[at : at + 9] = b"\xff" * 9
            case "end":
                del changed[max(at, 1) :]
    return bytes(changed)


def _may_overflow(path: Path) -> bool:
    """Whether weights are NaN, which MaxPool may pass over, or so large that a sum overflows in one
    order and not in another."""
    import numpy as np
    import onnx

    arrays = (onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer)
    floats = [array for array in arrays if array.dtype.kind == "f" and array.size]
    return not all(np.abs(array).max() < 1e18 for array in floats)


@pytest.mark.slow
def test_mutated_models_are_answered(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    sources = [shared_data(f"models/{name}").read_bytes() for name in MODELS]
    rng = random.Random(20)
    for index in range(COUNT):
        mutated = _mutated(sources[index % len(sources)], rng)
        (tmp_path / f"{index:03}.onnx").write_bytes(mutated)
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(DEADLINE), str(MEMORY), str(tmp_path), "0"],
        capture_output=True,
        text=True,
        check=False,
    )
    answers: list[tuple[str, int, str]] = [
        tuple(json.loads(line)) for line in child.stdout.splitlines()
    ]
    assert len(answers) == COUNT, (f"{len(answers):03}.onnx", child.stderr[-500:])
    for name, code, text in answers:
        assert "\n" not in text
        assert code in (0, 2, 3) or (code == 6 and _may_overflow(tmp_path / name)), (name, text)
    codes = Counter(code for _, code, _ in answers)
    assert codes[0] >= 10, "nothing survives: the mutations are too coarse to reach past parsing"
    assert codes[2] >= 50
