"""Every device file: sourced, complete enough to be used, and sliced as it can be rented."""

from __future__ import annotations

import math

import pytest

from trivium.compiler import targets
from trivium.compiler.errors import BadInput
from trivium.targets import TARGETS, load
from trivium.targets.load import NOT_FIGURES

DEVICES = sorted(set(TARGETS) - {"cpu"})


def test_at_least_24_devices_of_all_families() -> None:
    found = [targets.find(name) for name in targets.names()]
    assert len(found) >= 24
    assert {target.family for target in found} == {"cpu", "gpu", "tpu", "fpga"}
    assert {"tpu", "nvidia", "amd", "lattice"} <= {t.name.partition("-")[0] for t in found}


@pytest.mark.parametrize("name", DEVICES)
def test_every_figure_has_a_source(name: str) -> None:
    document = load.read(name)
    assert set(document) - NOT_FIGURES == set(document["sources"])
    assert all(source.strip() for source in document["sources"].values())


@pytest.mark.parametrize("name", DEVICES)
def test_figures_are_plausible(name: str) -> None:
    target = targets.find(name)
    assert target.name == name
    assert target.backend in target.backends
    for figure in (target.memory_bytes, target.memory_bytes_per_s, target.launch_s, target.watts):
        assert figure is None or figure > 0
    assert all(1e12 < rate < 1e17 for rate in target.peak_ops.values())
    if target.family in ("gpu", "tpu"):
        assert target.memory_bytes is not None
        assert target.peak_ops.get("bfloat16", 0) <= target.peak_ops.get("int8", math.inf)
    if target.family == "gpu":
        assert target.options["arch"].startswith("sm_")
    if target.family == "fpga":
        assert target.options["part"]


@pytest.mark.parametrize(
    ("name", "chips"),
    [
        ("tpu-v5e", 1),
        ("tpu-v5e:2x2", 4),
        ("tpu-v5e:16x16", 256),
        ("tpu-v5p:4x4x4", 64),
        ("tpu-v4", 1),
        ("tpu-v4:2x2x1", 4),
        ("tpu-7x:2x2x2", 8),
        ("tpu-v6e", 1),
    ],
)
def test_a_slice_has_the_product_of_its_sides_in_chips(name: str, chips: int) -> None:
    target = targets.find(name)
    assert target.chips == chips
    assert target.topology is not None
    assert math.prod(map(int, target.topology.split("x"))) == chips
    assert target.options["topology"].endswith(target.topology)


@pytest.mark.parametrize(
    "name", ["tpu-v5e:3x3", "tpu-v5e:2x2x1", "tpu-v5p:4x4", "tpu-v4:", "tpu-7x:x", "tpu-v5e:-1x1"]
)
def test_a_slice_that_does_not_exist_is_refused_with_those_that_do(name: str) -> None:
    if name.endswith(":"):
        assert targets.find(name).topology == "1x1x1"
        return
    with pytest.raises(BadInput, match="it comes as") as caught:
        targets.find(name)
    assert "2x2" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["nvidia-t4:2x2", "cpu:4", "amd-zcu104:1x1"])
def test_what_has_no_slices_says_so(name: str) -> None:
    with pytest.raises(BadInput, match="no slices"):
        targets.find(name)


def test_an_unknown_device_lists_the_known_ones() -> None:
    with pytest.raises(BadInput, match="nvidia-h100-sxm"):
        targets.find("nvidia-h101")


def test_listing_reads_no_file() -> None:
    load.read.cache_clear()
    assert len(targets.names()) >= 24
    assert load.read.cache_info().misses == 0
