"""From a target to what XLA has to be told; what is missing and what would supply it."""

from __future__ import annotations

import pytest

from trivium.backends.xla import platforms
from trivium.compiler.errors import BadInput, ToolchainMissing, Unsupported
from trivium.compiler.types import Target


def tpu(generation: str, topology: str | None = None, chips: int = 1, **options: str) -> Target:
    return Target(
        f"tpu-{generation}",
        "tpu",
        ("xla",),
        chips=chips,
        topology=topology,
        options={"generation": generation, **options},
    )


@pytest.mark.parametrize(
    ("target", "topology", "accelerator"),
    [
        (tpu("v5e", "2x2", 4), "v5e:2x2", "v5litepod-4"),
        (tpu("v5e", "16x16", 256), "v5e:16x16", "v5litepod-256"),
        (tpu("v6e"), "v6e:1x1", "v6e-1"),
        (tpu("v5p", "4x4x4", 64), "v5p:4x4x4", "v5p-128"),
        (tpu("TPU7x", "2x2x1", 4), "TPU7x:2x2x1", "tpu7x-8"),
        (tpu("v4", "2x2x1", 4, accelerator_type="v4-pod"), "v4:2x2x1", "v4-pod"),
        (Target("t", "tpu", ("xla",), options={"topology": "v5e:2x4"}), "v5e:2x4", "v5litepod-8"),
    ],
)
def test_a_slice_is_named_as_libtpu_does(target: Target, topology: str, accelerator: str) -> None:
    device = platforms.device_of(target)
    assert (device.topology, device.accelerator_type) == (topology, accelerator)
    assert platforms.environment(device)["TPU_ACCELERATOR_TYPE"] == accelerator


def test_what_is_not_known_is_refused_with_what_is() -> None:
    with pytest.raises(Unsupported, match=r"'v9'.*known: v4, v5e"):
        platforms.device_of(tpu("v9"))
    with pytest.raises(BadInput, match="a slice of 2x2 has 4 chips, the target says 8"):
        platforms.device_of(tpu("v5e", "2x2", 8))
    with pytest.raises(BadInput, match="'2xx' is no slice"):
        platforms.device_of(tpu("v5e", "2xx", 4))
    with pytest.raises(Unsupported, match=r"description 'rock'.*h100_sxm"):
        platforms.device_of(Target("nvidia-rock", "gpu", ("xla",)))
    with pytest.raises(Unsupported, match="no compiler for fpga"):
        platforms.device_of(Target("amd-u250", "fpga", ("fpga", "xla")))


def test_a_gpu_is_found_by_its_own_name_or_by_option() -> None:
    named = Target("nvidia-h100-sxm", "gpu", ("xla",))
    told = Target("nvidia-mine", "gpu", ("xla",), options={"gpu_target": "l4"})
    assert platforms.device_of(named).gpu_target == "h100_sxm"
    assert platforms.device_of(told).gpu_target == "l4"


def test_every_description_says_which_code_to_make() -> None:
    names = platforms.gpu_targets()
    assert {"h100_sxm", "a100_80_sxm", "l4", "t4", "h200", "b200"} <= set(names)
    for name in names:
        text = platforms.gpu_description(name)
        assert "cuda_compute_capability" in text
        assert 'platform_name: "CUDA"' in text


def test_a_missing_compiler_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platforms, "_importable", lambda module: module in ("jax", "jaxlib"))
    assert platforms.missing() is None
    with pytest.raises(ToolchainMissing, match=r"tpu-v5e: libtpu is not installed; pip install"):
        platforms.require("tpu", "tpu-v5e")
    reason = platforms.missing("cuda")
    assert reason is not None
    assert "jax-cuda13-plugin and jax-cuda13-pjrt are not installed" in reason
    assert "trivium[gpu]" in reason
