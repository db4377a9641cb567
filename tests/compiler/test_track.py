"""The record of predicted against measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from trivium.compiler import track
from trivium.compiler.cli import main
from trivium.compiler.errors import BadInput

RUN = track.Run("2026-01-01", "m", "none", "cpu", "onnxruntime", 1.0, (0.8, 1.25), 1.1)


def test_figures_of_merit_by_hand(tmp_path: Path) -> None:
    other = replace(RUN, backend="xla", predicted_s=2.0, interval_s=(1.8, 2.2), measured_s=1.0)
    for run in (RUN, other):
        track.add(tmp_path / "runs", run)
    found = track.summarize(track.read(tmp_path / "runs"))
    assert set(found) == {"all", "cpu/onnxruntime", "cpu/xla"}
    assert found["all"]["count"] == 2
    assert found["all"]["mape"] == pytest.approx((0.1 / 1.1 + 1.0) / 2)
    assert found["all"]["coverage"] == 0.5
    assert found["all"]["tau"] == -1.0
    # ONNX Runtime was predicted to be the better one, and is 10% slower.
    assert (found["all"]["choices"], found["all"]["top1"]) == (1, 0.0)
    assert found["all"]["regret"] == pytest.approx(0.1)


def test_bench_adds_a_line_and_track_shows_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import trivium

    artifact = trivium.compile(_model(tmp_path), "cpu", out=tmp_path / "a", use_cache=False)
    record = tmp_path / "deep" / "runs.jsonl"
    for _ in range(2):
        command = ["bench", str(artifact.path), "--runs", "5", "--track", str(record)]
        assert main(command) == 0
    capsys.readouterr()
    assert main(["track", str(record), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["runs"] == 2
    assert document["cpu/onnxruntime"]["count"] == 2
    assert main(["track", str(record)]) == 0
    assert "cpu/onnxruntime" in capsys.readouterr().out


def _model(folder: Path) -> Path:
    from trivium.compiler import microbenchmarks

    return next(path for name, path in microbenchmarks.write(folder) if name == "small chain")


@pytest.mark.parametrize("text", ["", "nonsense\n", '{"date": 1}\n'])
def test_a_file_without_runs_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "runs").write_text(text)
    with pytest.raises(BadInput):
        track.read(tmp_path / "runs")
