"""Timings from another machine: shown beside the very same model, target and sizes, else not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest

from trivium.compiler import measurements
from trivium.compiler import model as models
from trivium.compiler.compare import compare
from trivium.compiler.errors import BadInput
from trivium.compiler.report import to_csv

ROOT = Path(__file__).parents[2]
TARGET = "nvidia-h100-sxm"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = '<ir_version: 10, opset_import: ["": 21]>\n'
    text += "main (float[n, 8] x) => (float[n, 8] y) {a = MatMul(x, w) y = Relu(a)}"
    proto = onnx.parser.parse_model(text)
    weight = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [8, 8], [0.5] * 64)
    proto.graph.initializer.append(weight)
    path = tmp_path_factory.mktemp("measured") / "small.onnx"
    onnx.save(proto, path)
    return path


def row_of(path: Path, /, **changed: Any) -> dict[str, Any]:
    return {
        "model": {"name": path.name, "sha256": models.content_hash(path)},
        "target": TARGET,
        "backend": "xla",
        "recipe": "none",
        "workload": {"dims": {"n": 4}, "shapes": {}},
        "latency_s": 2.5e-5,
        "ci_s": [2.4e-5, 2.6e-5],
        "calls": 50,
        "where": "XLA on 1 x an H100",
        "device": "an H100",
        "date": "2026-01-01",
        "peers": [{"name": "torch eager", "latency_s": 5e-5}],
        **changed,
    }


def written(folder: Path, *rows: Any, schema: int = 1) -> Path:
    path = folder / "measured.json"
    path.write_text(json.dumps({"schema": schema, "rows": rows}))
    return path


def test_compare_shows_what_was_measured(model: Path, tmp_path: Path) -> None:
    file = written(tmp_path, row_of(model))
    command = [sys.executable, "-m", "trivium.compiler.cli", "compare", str(model), "--json"]
    command += ["--target", TARGET, "--backend", "xla", "--shape", "n=4", "--measured", str(file)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    (row,) = json.loads(done.stdout)["rows"]
    assert row["measured"]["latency_s"] == 2.5e-5
    assert row["measured"]["where"] == "XLA on 1 x an H100"
    assert row["measured"]["date"] == "2026-01-01"
    result = compare(model, [TARGET], backends=["xla"], shape=["n=4"], measured=file)
    header, line = to_csv(result).splitlines()
    cells = dict(zip(header.split(","), line.split(","), strict=False))
    assert float(cells["measured_s"]) == 2.5e-5


@pytest.mark.parametrize(
    "changed",
    [
        {"model": {"name": "small.onnx", "sha256": "0" * 64}},
        {"target": "nvidia-t4"},
        {"backend": "tensorrt"},
        {"recipe": "int8"},
        {"workload": {"dims": {"n": 8}, "shapes": {}}},
    ],
)
def test_what_was_measured_of_another_thing_is_not_shown(
    model: Path, tmp_path: Path, changed: dict[str, Any]
) -> None:
    file = written(tmp_path, row_of(model, **changed))
    result = compare(model, [TARGET], backends=["xla"], shape=["n=4"], measured=file)
    assert result.rows[0]["measured"] is None


@pytest.mark.parametrize(
    ("changed", "schema", "message"),
    [
        ({"latency_s": "fast"}, 1, "row 0 has no sound 'latency_s'"),
        ({"workload": {}}, 1, "row 0 has no sound 'workload'"),
        ({"ci_s": [1.0]}, 1, "row 0 has no sound 'ci_s'"),
        ({}, 2, "its schema is 2"),
    ],
)
def test_damaged_files_are_refused(
    model: Path, tmp_path: Path, changed: dict[str, Any], schema: int, message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        measurements.read(written(tmp_path, row_of(model, **changed), schema=schema))


def test_what_is_no_file_of_measurements_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such file"):
        measurements.read(tmp_path / "absent.json")
    path = tmp_path / "list.json"
    path.write_text("[]")
    with pytest.raises(BadInput, match="no list of rows"):
        measurements.read(path)


@pytest.mark.slow
def test_artifacts_are_timed_beside_pytorch_and_shown(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("jax", reason="the xla backend needs the extra trivium[tpu]")
    pytest.importorskip("torch", reason="the peers need the extra trivium[torch]")
    import trivium

    artifacts, file = tmp_path / "artifacts", tmp_path / "out.json"
    artifacts.mkdir()
    trivium.compile(model, "cpu", backend="xla", shape=["n=4"], out=artifacts / "small")
    subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", artifacts, "-o", file, "--calls", "5"],
        check=True,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )
    (row,) = json.loads(file.read_text())["rows"]
    assert row["verification"]["status"] == "passed"
    timed = {peer["name"] for peer in row["peers"]}
    assert "torch eager" in timed
    assert timed | {note.partition(":")[0] for note in row["notes"]} >= {"torch.compile"}
    result = compare(model, ["cpu"], backends=["xla"], shape=["n=4"], measured=file)
    shown = result.rows[0]["measured"]
    assert shown["latency_s"] == row["latency_s"]
    assert shown["device"] == row["device"]
