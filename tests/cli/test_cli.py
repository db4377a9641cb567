"""The command line as a person uses it: real processes, exit codes, one line of error."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Find = Callable[[str], Path]


def trivium(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the command line and hold it to an exit code."""
    done = subprocess.run(
        [sys.executable, "-m", "trivium.compiler.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == code, done.stderr
    if code:
        lines = done.stderr.strip().splitlines()
        assert "Traceback" not in done.stderr
        assert len([line for line in lines if line.startswith("trivium: ")]) == 1, done.stderr
    return done


def document(*arguments: object) -> Any:
    return json.loads(trivium(*arguments, "--json").stdout)


@pytest.fixture(scope="session")
def resnet(shared_data: Find) -> Path:
    return shared_data("models/cifar_resnet20.onnx")


@pytest.fixture(scope="session")
def artifact(resnet: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "resnet20.cpu"
    trivium("compile", resnet, "--target", "cpu", "--shape", "input=1x3x32x32", "-o", out)
    return out


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys; from trivium.compiler import cli; cli.make_parser().format_help();"
        "print([m for m in ('numpy', 'onnx', 'onnx_ir', 'rich') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_every_verb_has_help() -> None:
    from trivium.compiler.cli import make_parser

    listing = make_parser().format_help()
    for verb in ("compile", "compare", "plan", "optimize", "run", "bench", "eval", "inspect",
                 "verify", "targets", "backends", "passes", "doctor", "cache"):  # fmt: skip
        assert verb in listing
        assert "--json" in trivium(verb, "--help").stdout


def test_compile_says_what_it_did(resnet: Path, tmp_path: Path) -> None:
    summary = document("compile", resnet, "--target", "cpu", "-o", tmp_path / "out")
    assert summary["verification"]["status"] == "passed"
    assert summary["verification"]["max_rel_error"] < 1e-3
    assert (Path(summary["artifact"]) / "manifest.json").is_file()
    assert set(summary) >= {"artifact", "target", "backend", "recipe", "seconds", "estimate"}


def test_run_bench_verify_inspect(artifact: Path, tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((1, 3, 32, 32)).astype(np.float32)
    np.savez(tmp_path / "x.npz", input=x)
    trivium("run", artifact, "--input", tmp_path / "x.npz", "--output", tmp_path / "y.npz")
    assert np.load(tmp_path / "y.npz")["logits"].shape == (1, 10)
    timing = document("bench", artifact, "--runs", 5)
    assert 0 < timing["ci_s"][0] <= timing["latency_s"] <= timing["ci_s"][1]
    assert document("verify", artifact)["verification"]["status"] == "passed"
    assert document("inspect", artifact)["target"] == "cpu"


def test_inspect_counts_a_model(resnet: Path) -> None:
    facts = document("inspect", resnet)
    assert facts["operators"]["Conv"] == 19
    assert facts["inputs"][0]["shape"] == ["N", 3, 32, 32]


def test_eval_accuracy(shared_data: Find, tmp_path: Path) -> None:
    samples = np.load(shared_data("samples/mnist_test1000.npz"))
    x = samples["x"][:200, None].astype(np.float32)
    np.savez(tmp_path / "mnist.npz", x=x, y=samples["y"][:200])
    model = shared_data("models/mnist_cnn_cntk.onnx")
    result = document("eval", model, "--data", tmp_path / "mnist.npz")
    assert result["metric"] == "accuracy"
    assert result["samples"] == 200
    assert result["value"] > 0.95


def test_optimize_writes_onnx(resnet: Path, tmp_path: Path) -> None:
    import onnx

    out = tmp_path / "optimized.onnx"
    trivium("optimize", resnet, "-o", out)
    model = onnx.load(out)
    onnx.checker.check_model(model)
    assert {op.version for op in model.opset_import if op.domain == ""} == {24}
    assert list(tmp_path.iterdir()) == [out]


def test_second_compile_is_reused_and_damage_is_noticed(resnet: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    trivium("compile", resnet, "--target", "cpu", "-o", out)
    manifest = (out / "manifest.json").read_text()
    trivium("compile", resnet, "--target", "cpu", "-o", out)
    assert (out / "manifest.json").read_text() == manifest

    with (out / "model.onnx").open("r+b") as stream:
        stream.seek(200)
        stream.write(b"\xff\xff\xff")
    assert "checksum" in trivium("run", out, code=2).stderr
    trivium("compile", resnet, "--target", "cpu", "-o", out)
    trivium("verify", out)


def test_lock_replays_to_the_same_bytes(resnet: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    common = ("compile", resnet, "--target", "cpu", "--no-cache")
    trivium(*common, "-o", first)
    trivium(*common, "--recipe", first / "recipe.lock.toml", "-o", second)
    hashes = [json.loads((out / "manifest.json").read_text())["files"] for out in (first, second)]
    assert hashes[0] == hashes[1]


def test_two_compiles_at_once(resnet: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "trivium.compiler.cli", "compile", str(resnet), "--target",
               "cpu", "--no-cache", "-o", str(tmp_path / "out")]  # fmt: skip
    both = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(2)]
    for process in both:
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr
    trivium("verify", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_interrupted_compile_leaves_nothing(resnet: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "trivium.compiler.cli", "compile", str(resnet), "--target",
               "cpu", "--no-cache", "-o", str(tmp_path / "out")]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not any(tmp_path.iterdir()) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.skip("the compile was over before the signal came")
    assert process.returncode == 130, stderr
    assert "interrupted" in stderr
    assert not any(tmp_path.iterdir())


def test_a_verb_that_takes_too_long_is_given_up(resnet: Path, tmp_path: Path) -> None:
    done = trivium("compile", resnet, "--target", "cpu", "--no-cache", "--timeout", "0.05",
                   "-o", tmp_path / "out", code=5)  # fmt: skip
    assert "--timeout" in done.stderr
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["compile", "absent.onnx", "--target", "cpu"], 2, "no such model"),
        (["compile", "{model}", "--target", "abacus"], 2, "no target named"),
        (["compile", "{model}", "--target", "cpu:2x2"], 2, "no slices"),
        (["compile", "{model}", "--target", "cpu", "--backend", "fpga"], 2, "--backend"),
        (["compile", "{model}", "--target", "cpu", "--recipe", "magic"], 2, "no recipe named"),
        (["compile", "{model}", "--target", "cpu", "--shape", "x=1"], 2, "input=Nx3x32x32"),
        (["compile", "{model}", "--target", "cpu", "--shape", "input=1x4x32x32"], 2, "fixes 3"),
        (["compile", "{model}", "--target", "cpu", "--calib", "no.npz"], 2, "no such file"),
        (["compile", "{model}", "--target", "cpu", "-o", "{folder}"], 2, "not an artifact"),
        (["optimize", "{model}", "-o", "out.txt"], 2, ".onnx"),
        (["run", "{folder}"], 2, "not an artifact"),
        (["targets", "abacus"], 2, "no target named"),
        (["passes", "abacus"], 2, "no pass named"),
        (["eval", "{model}", "--data", "{model}"], 2, "not a readable"),
    ],
)
def test_bad_usage(
    arguments: list[str], code: int, says: str, resnet: Path, tmp_path: Path
) -> None:
    (tmp_path / "something").touch()
    filled = [a.format(model=resnet, folder=tmp_path) for a in arguments]
    assert says in trivium(*filled, code=code).stderr
    assert [path.name for path in tmp_path.iterdir()] == ["something"]


def test_an_unreadable_model(tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    model.write_bytes(b"x")
    model.chmod(0)
    if os.access(model, os.R_OK):
        pytest.skip("this user reads everything")
    assert "permission" in trivium("compile", model, "--target", "cpu", code=2).stderr


def test_dry_run_builds_nothing(resnet: Path, tmp_path: Path) -> None:
    shown = document("compile", resnet, "--target", "cpu", "--recipe", "int8", "--dry-run",
                     "--shape", "N=1", "-o", tmp_path / "out")  # fmt: skip
    assert {row["name"]: row["modified"] for row in shown["applied"]}["quantize-static"]
    assert shown["estimate"]["lo"] < shown["estimate"]["seconds"] < shown["estimate"]["hi"]
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_a_dry_run_predicts_what_a_compile_does(shared_data: Find, tmp_path: Path) -> None:
    asked = ("compile", shared_data("llm-shakespeare"), "--target", "cpu", "--context", "64")
    dry = document(*asked, "--dry-run")
    made = document(*asked, "--no-cache", "-o", tmp_path / "out")
    assert "insert-kv-cache" in {row["name"] for row in dry["applied"]}
    # The processor's clock, of which the target is told, is not the same at every moment.
    assert dry["estimate"]["seconds"] == pytest.approx(made["estimate"]["seconds"], rel=0.05)
    told = trivium(*asked[:-1], "9999", "--dry-run", code=2)
    assert "the model has 512 positions" in told.stderr
    told = trivium(*asked, "--dry-run", "--option", "kv_cache=int3", code=2)
    assert "give f32 or int8" in told.stderr


def test_a_dry_run_shows_every_refusal(shared_data: Find, tmp_path: Path) -> None:
    model = shared_data("models/espcn_x3_qonnx.onnx")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "trivium.compiler.cli",
            "compile",
            str(model),
            "--target",
            "cpu",
            "--dry-run",
            "--json",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3
    assert len(json.loads(done.stdout)["refusals"]) == 8


def test_max_error_gates(resnet: Path, tmp_path: Path) -> None:
    done = trivium("compile", resnet, "--target", "cpu", "--max-error", "1e-12", "--no-cache",
                   "-o", tmp_path / "out", code=6)  # fmt: skip
    assert "--max-error" in done.stderr
    assert not any(tmp_path.iterdir())


def test_listings(tmp_path: Path) -> None:
    assert "cpu" in {row["name"] for row in document("targets")}
    backends = {row["name"]: row for row in document("backends")}
    assert backends["onnxruntime"]["available"]
    listed = document("passes")
    assert "fold-constants" in listed["passes"]
    assert "none" in listed["recipes"]
    extras = {row["extra"]: row for row in document("doctor")["extras"]}
    assert set(extras) >= {"tpu", "gpu", "tvm", "fpga", "tensorrt", "hf", "all", "dev"}
    assert set(extras) == set(metadata("trivium").get_all("Provides-Extra") or ())
    assert document("cache")["entries"] >= 0


def test_compare_writes_every_form(resnet: Path, tmp_path: Path) -> None:
    html, csv = tmp_path / "report.html", tmp_path / "rows.csv"
    result = document("compare", resnet, "--shape", "N=1", "--html", html, "--csv", csv)
    rows = {row["target"]: row for row in result["rows"]}
    assert {"cpu", "nvidia-t4", "tpu-v5e", "amd-zcu104"} <= set(rows)
    for row in result["rows"]:
        known = row["latency_s"] is not None
        assert row["refusals"] or known or row["notes"]
        assert not known or row["interval_s"][0] < row["latency_s"] < row["interval_s"][1]
    assert not rows["amd-zcu104"]["feasible"]
    assert result["best"]
    assert html.read_text().startswith("<!doctype html>")
    assert len(csv.read_text().splitlines()) == len(rows) + 1


def test_compare_measures_what_runs_here(resnet: Path) -> None:
    result = document("compare", resnet, "--shape", "N=1", "--target", "cpu", "--target",
                      "nvidia-t4", "--measure")  # fmt: skip
    measured = {row["target"]: row["measured"] for row in result["rows"]}
    assert measured["cpu"]["latency_s"] > 0
    assert measured["nvidia-t4"] is None


def test_compare_wants_every_dimension(resnet: Path) -> None:
    assert "--shape" in trivium("compare", resnet, code=2).stderr


def test_plan_says_why_each_loser_lost(resnet: Path) -> None:
    common = ("plan", resnet, "--shape", "N=1", "--target", "cpu", "--target", "nvidia-t4")
    result = document(*common, "--objective", "energy", "--max-latency", "1s")
    assert result["best"]["target"] == "nvidia-t4"
    assert all(row["verdict"] for row in result["candidates"])
    assert "--max-latency" not in trivium(*common, "--max-latency", "1s").stderr
    assert "latency" in trivium(*common, "--max-latency", "1ns", code=1).stderr
    assert "--max-latency" in trivium(*common, "--max-latency", "soon", code=2).stderr


def test_what_is_not_predicted_says_so_and_with_which_flag_it_would_be(
    resnet: Path, tmp_path: Path
) -> None:
    said = trivium("compile", resnet, "--target", "cpu", "-o", tmp_path / "out").stdout
    line = next(line for line in said.splitlines() if line.startswith("predicted"))
    assert line.split(None, 1)[1] == (
        "nothing (input[N] symbolic; bind with --shape, e.g. --shape input=1x3x32x32)"
    )
    shape = ("--shape", "input=1x3x32x32")
    bound = trivium("compile", resnet, "--target", "cpu", *shape, "-o", tmp_path / "bound").stdout
    assert "nothing" not in bound
