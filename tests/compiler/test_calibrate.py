"""Calibration: fits recover what made the points, and odd files are told, not fitted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from trivium.compiler import calibrate, fitting, targets
from trivium.compiler.calibration import Calibration, from_toml, interval, spread_of
from trivium.compiler.cli import main
from trivium.compiler.errors import BadInput, Unsupported
from trivium.compiler.machines import cpu, gpu
from trivium.compiler.microbenchmarks import MICROBENCHMARKS
from trivium.targets import calibrations

B200 = targets.find("nvidia-b200")


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRIVIUM_CALIBRATIONS", str(tmp_path / "calibrations"))
    return tmp_path / "calibrations"


def points(
    path: Path, rows: int = 40, unit: str = "latency_us", scale: float = 1e6, spoil: int = 0
) -> dict[str, float]:
    """Write points that the formula itself makes, with 3% noise; return its coefficients."""
    truth = dict(calibrations.find(B200, "product").coefficients)
    truth |= {"sustained": 0.6, "memory": 0.9, "launch_s": 4e-6}
    random = np.random.default_rng(0)
    sizes = 2.0 ** random.integers(5, 14, (rows, 3))
    chip = gpu.Chip.of(B200, B200.peak_ops["bfloat16"])
    seconds = gpu.product(sizes[:, 0], sizes[:, 1], sizes[:, 2], chip, truth).seconds * np.exp(
        random.normal(0, 0.03, rows)
    )
    seconds[:spoil] *= 20.0
    lines = [f"m,n,k,{unit}"]
    lines += [
        ",".join(f"{v:.0f}" for v in size) + f",{t * scale}"
        for size, t in zip(sizes, seconds, strict=True)
    ]
    path.write_text("\n".join(lines) + "\n")
    return truth


def test_published_points_are_fitted_and_used(tmp_path: Path, own_folder: Path) -> None:
    truth = points(tmp_path / "points.csv")
    before = calibrations.find(B200, "product")
    assert before.scope == "family"
    assert main(["calibrate", "nvidia-b200", "--from", str(tmp_path / "points.csv")]) == 0
    after = calibrations.find(B200, "product")
    assert (own_folder / "nvidia-b200.toml").is_file()
    assert after.scope == "device"
    assert after.spread < 0.1 < before.spread
    assert after.points == 30
    assert "points.csv" in after.basis
    for name in ("sustained", "memory", "launch_s"):
        assert after[name] == pytest.approx(truth[name], rel=0.25)
    # What the file does not change is the family's.
    assert after["split_s"] == before["split_s"]


def test_outliers_are_named_and_left_out(tmp_path: Path) -> None:
    points(tmp_path / "points.csv", spoil=2)
    found = calibrate.from_csv(B200, tmp_path / "points.csv")
    assert [line.split(":")[0] for line in found.left_out] == ["row 2", "row 3"]
    assert all("above the trend" in line for line in found.left_out)


def test_too_many_outliers_are_no_trend(tmp_path: Path) -> None:
    points(tmp_path / "points.csv", spoil=16)
    with pytest.raises(BadInput, match="times off any trend"):
        calibrate.from_csv(B200, tmp_path / "points.csv")


@pytest.mark.parametrize(("unit", "scale"), [("latency_us", 1e3), ("latency_ms", 1e9)])
def test_wrong_units_are_told(tmp_path: Path, unit: str, scale: float) -> None:
    points(tmp_path / "points.csv", unit=unit, scale=scale)
    with pytest.raises(BadInput, match="in another unit than the column's name says"):
        calibrate.from_csv(B200, tmp_path / "points.csv")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("m,n,k\n1,2,3\n", "exactly one of"),
        ("m,n,latency_us\n1,2,3\n", "lacks k"),
        ("m,n,k,latency_us\n" + "64,64,64,5\n" * 9, "9 points, 10 are the least"),
        ("m,n,k,latency_us\n" + "64,64,64,5\n" * 9 + "64,64,x,5\n", "row 11: k = 'x'"),
        ("m,n,k,latency_us\n" + "64,64,64,-5\n" * 12, "row 2: latency_us = '-5'"),
        ("m,n,k,dtype,latency_us\n" + "64,64,64,int3,5\n" * 12, "dtype int3"),
        ("", "lacks k, m, n"),
    ],
)
def test_files_that_cannot_be_fitted_are_told(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "points.csv").write_text(text)
    with pytest.raises(BadInput, match=reason):
        calibrate.from_csv(B200, tmp_path / "points.csv")


def test_hardware_that_is_not_here_is_not_measured() -> None:
    with pytest.raises(Unsupported, match="no such hardware"):
        calibrate.measure(B200)
    with pytest.raises(Unsupported, match="for GPUs only"):
        calibrate.from_csv(targets.find("tpu-v5e"), Path("any.csv"))


def test_a_broken_file_names_itself(own_folder: Path) -> None:
    own_folder.mkdir()
    (own_folder / "nvidia-b200.toml").write_text("[product\n")
    with pytest.raises(BadInput, match="not readable as TOML"):
        calibrations.find(B200, "product")
    with pytest.raises(BadInput, match="missing or unknown: basis"):
        from_toml({"coefficients": {}}, "here")


def test_a_file_comes_back_as_it_was_written(tmp_path: Path) -> None:
    one = Calibration({"a": 0.12345678}, 0.1, "by hand", "2026-01-01", 12)
    calibrate.write(tmp_path / "x.toml", {"product": one})
    calibrate.write(tmp_path / "x.toml", {"stream": one})
    import tomllib

    document = tomllib.loads((tmp_path / "x.toml").read_text())
    assert set(document) == {"product", "stream"}
    assert from_toml(document["product"], "x") == Calibration(
        {"a": 0.1235}, 0.1, "by hand", "2026-01-01", 12
    )


def test_the_fit_finds_the_coefficients_that_made_the_points() -> None:
    x = np.linspace(1, 30, 30)
    truth = {"a": 2.0, "b": 0.3}
    seconds = truth["a"] + truth["b"] * x
    seconds[7] *= 8.0
    bounds = {"a": (0.01, 100.0), "b": (0.01, 100.0)}
    found = fitting.fit(
        lambda c: c["a"] + c["b"] * x, seconds, {"a": 1.0, "b": 1.0}, ("a", "b"), bounds
    )
    assert found["a"] == pytest.approx(2.0, rel=0.1)
    assert found["b"] == pytest.approx(0.3, rel=0.1)


def test_spread_holds_eight_of_ten() -> None:
    errors = np.random.default_rng(0).normal(0, 0.2, 2000)
    low, high = interval(1.0, spread_of(errors.tolist()))
    inside = (np.exp(errors) >= low) & (np.exp(errors) <= high)
    assert 0.78 < inside.mean() < 0.82


def test_there_are_at_most_thirty_microbenchmarks_for_six_coefficients() -> None:
    assert len(MICROBENCHMARKS) <= 30
    assert len(cpu.DEVICE) <= 6
    assert len(gpu.PRODUCT_DEVICE) <= 6


@pytest.mark.slow
def test_this_cpu_is_calibrated_on_an_engine_that_is_here() -> None:
    """The point of a microbenchmark: built, run, its kernels counted; ten of them make a fit."""
    import tempfile

    from trivium.compiler import microbenchmarks

    host = targets.find("cpu")
    with tempfile.TemporaryDirectory() as folder:
        models = list(microbenchmarks.write(Path(folder)))[::2]
        found = [
            calibrate.point("onnxruntime", host, name, path, (), 0.05) for name, path in models
        ]
    calibration = calibrate.fit_engine("onnxruntime", host, found)
    assert set(calibration.coefficients) == set(cpu.DEVICE)
    assert calibration.points == len(found)
    assert 0.0 < calibration.spread < 3.0
    assert "onnxruntime" in calibration.basis
