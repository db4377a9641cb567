"""The project that an AMD user is handed: complete, readable, and its host program right."""

from __future__ import annotations

import configparser
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest

import trivium
from tests.backends.fpga import qdq
from trivium.compiler import targets
from trivium.compiler.artifact import Artifact

GOLDEN = Path(__file__).parents[2] / "golden" / "fpga" / "kernel.cpp"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("fpga")
    onnx.save(qdq.network(4), folder / "small.onnx")
    return trivium.compile(
        folder / "small.onnx",
        qdq.ZCU104,
        out=folder / "out",
        options={"interval_us": "50"},
        use_cache=False,
    )


def test_the_manifest_says_what_ran_and_what_did_not(artifact: Artifact) -> None:
    manifest = artifact.manifest
    assert manifest["verification"]["status"] == "passed"
    assert "g++ simulation" in manifest["verification"]["compared"]["where"]
    assert any("no Vitis tool" in note for note in manifest["notes"])
    assert manifest["details"]["interval_cycles"] <= 50e-6 * 200e6
    assert manifest["estimate"]["resources"]["dsp"] > 0
    assert manifest["estimate"]["period_s"] < manifest["estimate"]["seconds"]
    assert set(manifest["details"]["files"]) <= set(manifest["files"])


def test_the_project_is_complete(artifact: Artifact) -> None:
    wanted = {
        "hls/kernel.cpp",
        "hls/kernel.h",
        "hls/layers.h",
        "hls/weights.h",
        "hls/tb.cpp",
        "hls/golden.h",
        "sim/ap_int.h",
        "sim/hls_stream.h",
        "host/host.cpp",
        "host/host_ops.h",
        "host/host_ops.py",
        "host/run_xrt.py",
        "host/ports.json",
        "hls_config.cfg",
        "system.cfg",
        "Makefile",
        "README.md",
    }
    assert wanted <= set(artifact.manifest["files"])
    config = configparser.ConfigParser(strict=False)
    config.read_string("[top]\n" + (artifact.path / "hls_config.cfg").read_text())
    assert config["top"]["part"] == "xczu7ev-ffvc1156-2-e"
    assert config["hls"]["clock"] == "200MHz"
    assert config["hls"]["syn.top"] == "trivium_top"
    system = (artifact.path / "system.cfg").read_text().split()
    assert system == [
        "[connectivity]",
        "nk=trivium_top:1:trivium_top_1",
        "sp=trivium_top_1.m_axi_gmem0:HP0",
        "sp=trivium_top_1.m_axi_gmem1:HP0",
    ]
    for name in ("host/run_xrt.py", "host/host_ops.py"):
        compile((artifact.path / name).read_text(), name, "exec")
    for name in wanted:
        text = (artifact.path / name).read_text()
        assert "${" not in text.replace("$(", "")
        assert str(artifact.path) not in text


def test_kernel_is_the_golden_file(artifact: Artifact, request: pytest.FixtureRequest) -> None:
    text = (artifact.path / "hls" / "kernel.cpp").read_text()
    if request.config.getoption("--update-golden"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text(), "run pytest --update-golden and read the difference"


@pytest.mark.slow
def test_the_makefile_simulates(artifact: Artifact, tmp_path: Path) -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    shutil.copytree(artifact.path, tmp_path / "project")
    done = subprocess.run(
        ["make", "sim"], cwd=tmp_path / "project", capture_output=True, text=True, check=True
    )
    assert "2 frames, bit-exact" in done.stdout


@pytest.mark.slow
def test_the_host_program_does_what_the_executable_does(artifact: Artifact, tmp_path: Path) -> None:
    """host.cpp, compiled against a stand-in for XRT whose kernel is the C++ one."""
    program = tmp_path / "host"
    headers = tmp_path / "include"
    shutil.copytree(Path(__file__).parent / "xrt", headers / "xrt")
    subprocess.run(
        [
            "g++",
            "-std=c++17",
            "-O1",
            "-Wno-unknown-pragmas",
            f"-I{headers}",
            "-Isim",
            "-Ihls",
            "-o",
            program,
            "host/host.cpp",
            "hls/kernel.cpp",
        ],
        cwd=artifact.path,
        check=True,
    )
    executable = artifact.load()
    ports = json.loads((artifact.path / "host" / "ports.json").read_text())
    shape = ports["inputs"][0]["shape"]
    x = np.random.default_rng(1).standard_normal((5, *shape)).astype(np.float32)
    x.tofile(tmp_path / "x.bin")
    files = [tmp_path / "x.bin", tmp_path / "y.bin"]
    subprocess.run([program, "kernel.xclbin", "5", *files], check=True)
    (expected,) = executable.run({"x": x}).values()
    actual = np.fromfile(tmp_path / "y.bin", np.float32).reshape(expected.shape)
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(
    "name", [name for name in targets.names() if name.startswith("amd-") and name != "amd-rocm"]
)
def test_every_amd_target_gets_a_project_or_a_reason(name: str, tmp_path: Path) -> None:
    from trivium.backends.fpga.backend import BACKEND
    from trivium.compiler.types import Workload

    target = targets.find(name)
    if target.family != "fpga":
        pytest.skip(f"{name} is no FPGA")
    model = qdq.loaded(qdq.network(1))
    assert {BACKEND.refuses(node, target) for node in model.graph} == {None}
    estimate = BACKEND.estimate(model, target, Workload())
    assert estimate.seconds is not None
    assert 0 < estimate.seconds < 1e-3
    for resource, amount in estimate.resources.items():
        assert amount <= target.resources.get(resource, np.inf)
