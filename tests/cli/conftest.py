"""Running many command lines in one child process, and a model small enough to do it often."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

DEADLINE = 30

CHILD = """
import io, json, signal, sys
from contextlib import redirect_stderr, redirect_stdout
from trivium.compiler import cli
for arguments in json.load(sys.stdin):
    signal.alarm(int(sys.argv[1]))
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = cli.main(arguments)
        except SystemExit as error:
            code = error.code
    print(json.dumps([code, out.getvalue(), err.getvalue()]), file=sys.__stdout__, flush=True)
"""
"""What an engine's native code prints goes past the redirection, and so shows as no JSON."""


@dataclass(frozen=True)
class Answer:
    """What one command line came to."""

    arguments: tuple[str, ...]
    code: int
    stdout: str
    stderr: str


RunAll = Callable[[Sequence[Sequence[object]]], list[Answer]]


@pytest.fixture(scope="session")
def run_all() -> RunAll:
    """Return a function that runs command lines one after another, each under an alarm.

    It fails on the one that ends the child (a crash or a hang), and on any that is refused with
    anything but one line.
    """

    def run(lines: Sequence[Sequence[object]]) -> list[Answer]:
        texts = [tuple(map(str, line)) for line in lines]
        child = subprocess.run(
            [sys.executable, "-c", CHILD, str(DEADLINE)],
            input=json.dumps(texts),
            capture_output=True,
            text=True,
            check=False,
        )
        answers = [
            Answer(text, *json.loads(line))
            for text, line in zip(texts, child.stdout.splitlines(), strict=False)
        ]
        assert len(answers) == len(texts), (texts[len(answers)], child.stderr[-500:])
        for answer in answers:
            said = [line for line in answer.stderr.splitlines() if line.startswith("trivium: ")]
            usage = "usage: trivium" in answer.stderr
            assert len(said) == (1 if answer.code and not usage else 0), answer
            assert "a bug" not in answer.stderr, answer
        return answers

    return run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model: one product and a relu, batch symbolic."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weight = numpy_helper.from_array(np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["p"]), helper.make_node("Relu", ["p"], ["y"])],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path = tmp_path_factory.mktemp("tiny") / "tiny.onnx"
    onnx.save(model, path)
    return path
