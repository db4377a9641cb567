"""Every model of the folder of broken and awkward ones gets the right answer, in time.

One child process compiles them all, each under an alarm that ends the child even from inside C++
code: a crash or a hang then shows as a missing answer for the file that caused it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

DEADLINE = 20

CHILD = """
import json, signal, sys, tempfile
from pathlib import Path
import trivium
for path in sys.argv[2:]:
    signal.alarm(int(sys.argv[1]))
    with tempfile.TemporaryDirectory() as folder:
        try:
            artifact = trivium.compile(path, "cpu", out=Path(folder) / "out", use_cache=False)
            answer = [0, artifact.manifest["verification"]["status"],
                      " ".join(artifact.manifest["notes"])]
        except trivium.TriviumError as error:
            answer = [error.exit_code, type(error).__name__, str(error)]
    print(json.dumps([Path(path).stem, *answer]), flush=True)
"""

OK, BAD, UNSUPPORTED = (0, "passed"), (2, "BadInput"), (3, "Unsupported")

EXPECTED: dict[str, tuple[tuple[int, str], str]] = {
    "attr_without_type": (BAD, "'alpha' has neither type nor value"),
    "bad_graph_with_dup_value_info": (BAD, "'inp' has been used as graph input names multiple"),
    "bad_graph_with_duplicate_node_names": (OK, ""),
    "bad_graph_with_multi_level_errors": (BAD, "Incompatible dimensions for matrix mult"),
    "bad_graph_with_no_import_domains": (BAD, "imports no opset"),
    "conv_stride0": (BAD, "strides must only contain positive"),
    "corrupt-model": (BAD, "damaged"),
    "custom_op_node": (UNSUPPORTED, "'NegPos' of 'ai.onnx.contrib'"),
    "cycle": (BAD, "cycle"),
    "duplicate_output": (BAD, "'y' is defined 2 times"),
    "empty_file": (BAD, "empty"),
    "exponential_paths_64": (OK, ""),
    "ext_weights": (BAD, "'ext_weights.data' is absent"),
    "external_negative_offset": (BAD, "offset '-"),
    "external_traversal": (BAD, "outside of the model's folder"),
    "huge_dims": (BAD, "1180591620717411303424 elements"),
    "invalid_dim_param_value_repetition": (OK, ""),
    "model_with_external_initializers": (BAD, "'Pads.bin' is absent"),
    "nan_weights": (OK, "weights that hold NaN: w"),
    "nested_if_20": (OK, ""),
    "opset_9999": (BAD, "opset 9999"),
    "quant_scale_zero": (BAD, "its scale 0 is not a positive number"),
    "raw_data_short": (BAD, "7 bytes of data where its shape needs 36"),
    "reshape_two_minus1": (BAD, "multiple -1"),
    "shape_mismatch": (BAD, "Incompatible dimensions for matrix multiplication"),
    "stft_negative_frame_length": (BAD, "frame_length -2"),
    "transpose_matmul_4d_fusion_invalid_perm": (OK, ""),
    "truncated_half": (BAD, "damaged"),
    "undefined_input": (BAD, "reads 'nope', which nothing defines"),
    "unknown_op": (UNSUPPORTED, "no operator 'FluxCapacitor'"),
}

Answers = dict[str, tuple[int, str, str]]


@pytest.fixture(scope="module")
def answers(shared_data: Callable[[str], Path]) -> Answers:
    found: Answers = {}
    left = sorted(shared_data("bad").glob("*.onnx"))
    while left:
        child = subprocess.run(
            [sys.executable, "-c", CHILD, str(DEADLINE), *map(str, left)],
            capture_output=True,
            text=True,
            check=False,
        )
        lines = [json.loads(line) for line in child.stdout.splitlines()]
        found |= {name: (code, kind, text) for name, code, kind, text in lines}
        left = left[len(lines) :]
        if left:
            found[left[0].stem] = (
                -1,
                f"the process ended: {child.returncode}",
                child.stderr[-500:],
            )
            left = left[1:]
    return found


@pytest.mark.slow
def test_table_covers_the_folder(answers: Answers) -> None:
    assert sorted(answers) == sorted(EXPECTED)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPECTED)
def test_answer(name: str, answers: Answers) -> None:
    (code, kind), fragment = EXPECTED[name]
    assert answers[name][:2] == (code, kind), answers[name]
    assert fragment in answers[name][2]
    assert "\n" not in answers[name][2]
