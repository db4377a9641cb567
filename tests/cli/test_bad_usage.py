"""A clumsy and a hostile user: whatever they give, one line, the right exit code, nothing left."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

import trivium
from trivium.compiler.errors import BadInput

RunAll = Callable[[Sequence[Sequence[object]]], list[Any]]
TRIVIUM = (sys.executable, "-m", "trivium.compiler.cli")


@pytest.fixture(scope="module")
def artifact(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("artifact") / "tiny.cpu"
    trivium.compile(tiny, "cpu", out=out, shape=("n=1",), use_cache=False)
    return out


# --- models --------------------------------------------------------------------------------------


def _with_external(path: Path, entries: Mapping[str, str], *, as_attribute: bool = False) -> None:
    """A product with weights outside, where ``entries`` say."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=(4, 4))
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    product = helper.make_node("MatMul", ["x", "w"], ["y"])
    constant = helper.make_node("Constant", [], ["w"], value=tensor)
    graph = helper.make_graph(
        [constant, product] if as_attribute else [product],
        "external",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
        [] if as_attribute else [tensor],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path.write_bytes(model.SerializeToString())


def test_external_data_stays_in_the_folder(tmp_path: Path, run_all: RunAll) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    secret = tmp_path / "secret.bin"
    secret.write_bytes(bytes(64))
    (folder / "link.bin").symlink_to(secret)
    (folder / "up").symlink_to(tmp_path)
    (folder / "loop.bin").symlink_to("loop.bin")
    (folder / "device.bin").symlink_to("/dev/zero")
    (folder / "folder.bin").mkdir()
    (folder / "here.bin").write_bytes(bytes(64))
    os.mkfifo(folder / "pipe.bin")
    entries: list[dict[str, str]] = [
        {"location": location}
        for location in (
            "../secret.bin", str(secret), "link.bin", "up/secret.bin", "a/../../secret.bin",
            "loop.bin", "/dev/zero", "device.bin", "pipe.bin", "folder.bin", "", ".", "..",
            "x\0y", "absent.bin", "n" * 5000,
        )
    ]  # fmt: skip
    here = {"location": "here.bin"}
    entries += [
        {**here, "offset": "1"},
        {**here, "offset": "-4"},
        {**here, "offset": "9" * 40},
        {**here, "length": "63"},
        {**here, "length": "9" * 40},
        {**here, "offset": "0x10"},
    ]
    lines = []
    for as_attribute in (False, True):
        for index, one in enumerate(entries):
            path = folder / f"m{index}{as_attribute}.onnx"
            _with_external(path, one, as_attribute=as_attribute)
            lines.append(["inspect", path])
    for answer in run_all(lines):
        assert answer.code == 2, answer
    _with_external(folder / "good.onnx", here)
    assert run_all([["inspect", folder / "good.onnx"]])[0].code == 0


def test_what_is_no_model(tmp_path: Path, run_all: RunAll) -> None:
    os.mkfifo(tmp_path / "pipe.onnx")
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "endless.onnx").symlink_to("/dev/zero")
    (tmp_path / "loop.onnx").symlink_to("loop.onnx")
    (tmp_path / "text.onnx").write_text("hello\n")
    with (tmp_path / "sparse.onnx").open("wb") as stream:
        stream.truncate(5 << 30)
    for name, text in (("deep", "[" * 100_000), ("list", "[]"), ("untyped", '{"model_type": 3}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    (tmp_path / "piped").mkdir()
    os.mkfifo(tmp_path / "piped" / "config.json")
    names = ["pipe.onnx", "folder.onnx", "endless.onnx", "loop.onnx", "text.onnx", "sparse.onnx",
             "deep", "list", "untyped", "piped", "n" * 300 + ".onnx", "x\0y.onnx",
             "text.onnx/x.onnx"]  # fmt: skip
    before = sorted(tmp_path.iterdir())
    lines: list[Sequence[object]] = []
    for name in names:
        path = tmp_path / name
        lines += [
            ["inspect", path, "--json"],
            ["compile", path, "--target", "cpu", "-o", tmp_path / "out"],
            ["optimize", path, "-o", tmp_path / "out.onnx"],
            ["eval", path, "--data", tmp_path / "text.onnx"],
        ]
    for answer in run_all(lines):
        assert answer.code == 2, answer
        assert not answer.stdout
    assert sorted(tmp_path.iterdir()) == before


def test_names_that_are_unusual_but_fine(tiny: Path, tmp_path: Path, run_all: RunAll) -> None:
    model = tmp_path / "模型 ü.onnx"
    shutil.copy(tiny, model)
    out = tmp_path / ("o" * 250)
    lines = [
        ["compile", model, "--target", "cpu", "--no-cache", "-o", out],
        ["run", out, "--output", tmp_path / "résultat 1.npz"],
        ["optimize", model, "-o", tmp_path / ("é" * 120 + ".onnx")],
    ]
    assert [answer.code for answer in run_all(lines)] == [0, 0, 0]
    assert len(list(tmp_path.iterdir())) == 4


# --- data ----------------------------------------------------------------------------------------


def _npy(shape: tuple[int, ...]) -> bytes:
    """The header of an array, and none of its data."""
    text = repr({"descr": "<f4", "fortran_order": False, "shape": shape}).encode()
    text += b" " * (63 - (10 + len(text)) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def test_data_that_does_not_fit(
    tiny: Path, artifact: Path, tmp_path: Path, run_all: RunAll
) -> None:
    x = np.ones((1, 4), np.float32)
    arrays: dict[str, dict[str, Any]] = {
        "names": {"other": x},
        "none": {},
        "nan": {"x": x * np.nan},
        "infinite": {"x": x * np.inf},
        "complex": {"x": x.astype(np.complex64)},
        "strings": {"x": x.astype(str)},
        "dates": {"x": np.array(["2020-01-01"], "M8[D]")},
        "pickled": {"x": np.array([object()])},
        "empty": {"x": x[:0]},
        "rank": {"x": x[0]},
        "width": {"x": x[:, :3]},
        "scalar": {"x": np.float32(1)},
        "records": {"x": np.zeros((1, 4), [("a", "f4")])},
    }
    for name, held in arrays.items():
        np.savez(tmp_path / f"{name}.npz", **held)
    np.savez(tmp_path / "good.npz", x=x)
    whole = (tmp_path / "good.npz").read_bytes()
    (tmp_path / "half.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "zero.npz").touch()
    os.mkfifo(tmp_path / "pipe.npz")
    (tmp_path / "endless.npz").symlink_to("/dev/zero")
    (tmp_path / "folder.npz").mkdir()
    for name, shape in (("terabytes", (1 << 40,)), ("negative", (-1,))):
        with zipfile.ZipFile(tmp_path / f"{name}.npz", "w") as archive:
            archive.writestr("x.npy", _npy(shape))
    bad = sorted(path for path in tmp_path.glob("*.npz") if path.stem != "good")
    assert len(bad) == len(arrays) + 7
    lines: list[Sequence[object]] = []
    for path in bad:
        lines += [
            ["run", artifact, "--input", path, "--json"],
            ["compile", tiny, "--target", "cpu", "--shape", "n=1", "--calib", path,
             "-o", tmp_path / "out"],
            ["eval", artifact, "--data", path],
            ["eval", tiny, "--data", path, "--metric", "perplexity"],
        ]  # fmt: skip
    for answer in run_all(lines):
        assert answer.code == 2, answer
    assert run_all([["run", artifact, "--input", tmp_path / "good.npz"]])[0].code == 0
    assert not (tmp_path / "out").exists()


def test_labels_that_do_not_fit(artifact: Path, tmp_path: Path, run_all: RunAll) -> None:
    x = np.ones((2, 4), np.float32)
    for name, y in (("flat", np.float32(3)), ("long", np.zeros(3)), ("none", np.zeros(0))):
        np.savez(tmp_path / f"{name}.npz", x=x, y=y)
    np.savez(tmp_path / "scalar.npz", x=np.float32(1), y=np.zeros(1))
    for answer in run_all([["eval", artifact, "--data", path] for path in tmp_path.iterdir()]):
        assert answer.code == 2, answer


def test_feeds_in_python(artifact: Path) -> None:
    executable = trivium.load(str(artifact))
    good = {"x": np.ones((1, 4), np.float32)}
    assert executable.run({**good, "extra": 1})["y"].shape == (1, 3)
    for feeds, says in (
        ({}, "'x' is missing"),
        ({"y": 1}, "given: y"),
        ({"x": [[1, 2], [3]]}, "no array"),
        ({"x": "text"}, "takes float32"),
        ({"x": np.ones((2, 4), np.float32)}, r"shape \[2, 4\]"),
        ([1], "a list"),
    ):
        with pytest.raises(BadInput, match=says):
            executable.run(feeds)


# --- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "x", "[[pass]]", "[[pass]]\nname = 3", "pass = 3", "pass = ['x']", "name = 'a'\nzz = 1",
        "[[pass]]\nname = 'nope'", "[[pass]]\nname = 'simplify'\nzz = 1", "a = " + "[" * 5000,
        "[[pass]]\nname = 'fold-constants'\ninput_limit = 'x'",
        "[[pass]]\nname = 'fold-constants'\ninput_limit = true",
        "[[pass]]\nname = 'quantize-static'\nmethod = 'zz'",
        "[[pass]]\nname = 'quantize-static'\nmethod = {a = 1}",
        "[[pass]]\nname = 'prune-magnitude'\nsparsity = 2.0",
        "[[pass]]\nname = 'prune-magnitude'\nsparsity = nan",
        "[[pass]]\nname = 'prune-n-m'\nn = 5\nm = 4",
        "[[pass]]\nname = 'prune-n-m'\nn = 0\nm = 0",
    ],
)  # fmt: skip
def test_a_wrong_recipe(text: str, tmp_path: Path) -> None:
    from trivium.compiler import recipe

    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(BadInput) as caught:
        recipe.read(str(path))
    assert "\n" not in str(caught.value)


def test_numbers_that_are_none(tiny: Path, artifact: Path, tmp_path: Path, run_all: RunAll) -> None:
    model: list[object] = ["compile", tiny, "--target", "cpu", "-o", tmp_path / "out", "--no-cache"]
    lines: list[Sequence[object]] = [
        *(
            [*model, "--shape", f"n={size}"]
            for size in ("0", "-1", "1.5", "9" * 30, "9" * 5000, "")
        ),
        *([*model, "--max-error", error] for error in ("nan", "inf", "-1", "x")),
        *([*model, "--timeout", seconds] for seconds in ("nan", "inf", "0")),
        [*model, "--option", "novalue"],
        *(["bench", artifact, "--runs", runs] for runs in ("0", "-1")),
        ["bench", artifact, "--seconds", "nan"],
        ["eval", artifact, "--data", tmp_path, "--window", "0"],
        *(["plan", tiny, "--max-memory", size] for size in ("1e400GiB", "-1GiB", "16XB", "nan")),
        *(["plan", tiny, "--max-power", watts] for watts in ("inf", "nan", "0")),
    ]
    for answer in run_all(lines):
        assert answer.code == 2, answer
    assert not any(tmp_path.iterdir())
    assert run_all([["inspect", artifact, "--timeout", "1e300"]])[0].code == 0
    with pytest.raises(BadInput, match="--max-error"):
        trivium.compile(tiny, "cpu", out=tmp_path / "out", max_error=float("inf"))


def test_json_is_one_document(tiny: Path, artifact: Path, tmp_path: Path, run_all: RunAll) -> None:
    np.savez(tmp_path / "xy.npz", x=np.ones((2, 4), np.float32), y=np.zeros(2))
    lines: list[Sequence[object]] = [
        ["compile", tiny, "--target", "cpu", "--no-cache", "-o", tmp_path / "a"],
        ["compile", tiny, "--target", "cpu", "--shape", "n=1", "--dry-run"],
        ["compile", tiny, "--target", "nvidia-t4", "--backend", "tensorrt", "--shape", "n=1",
         "--no-cache", "-o", tmp_path / "b"],
        ["optimize", tiny, "-o", tmp_path / "o.onnx"],
        ["compare", tiny, "--shape", "n=1"],
        ["plan", tiny, "--shape", "n=1"],
        ["inspect", tiny], ["inspect", artifact], ["run", artifact], ["verify", artifact],
        ["bench", artifact, "--runs", "1"], ["eval", artifact, "--data", tmp_path / "xy.npz"],
        ["targets"], ["backends"], ["passes"], ["passes", "simplify"], ["passes", "int8"],
        ["doctor"], ["cache"],
    ]  # fmt: skip
    for answer in run_all([[*line, "--json"] for line in lines]):
        assert answer.code == 0, answer
        json.loads(answer.stdout)


# --- artifacts -----------------------------------------------------------------------------------


def _edited(artifact: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = artifact / "manifest.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _linked(path: Path) -> None:
    path.rename(path.parents[1] / "elsewhere")
    path.symlink_to(path.parents[1] / "elsewhere")


DAMAGE: dict[str, Callable[[Path], object]] = {
    "program outside": lambda a: _edited(
        a, lambda m: m["programs"][0].update(file="../model.onnx")
    ),
    "program absolute": lambda a: _edited(
        a, lambda m: m["programs"][0].update(file=str(a / "model.onnx"))
    ),
    "program without a checksum": lambda a: _edited(a, lambda m: m["files"].pop("model.onnx")),
    "file outside": lambda a: _edited(a, lambda m: m["files"].update({"../x": "0"})),
    "weights outside": lambda a: _edited(a, lambda m: m.update(weights="/etc/passwd")),
    "file is a link out": lambda a: _linked(a / "model.onnx"),
    "file is a pipe": lambda a: _fifo(a / "model.onnx"),
    "manifest is a pipe": lambda a: _fifo(a / "manifest.json"),
    "manifest is too deep": lambda a: (a / "manifest.json").write_text("[" * 100_000),
    "manifest is a list": lambda a: (a / "manifest.json").write_text("[]"),
    "manifest is no text": lambda a: (a / "manifest.json").write_bytes(b"\xff\xfe{}"),
    "no programs": lambda a: _edited(a, lambda m: m.update(programs=[])),
    "no dtype": lambda a: _edited(a, lambda m: m["inputs"][0].update(dtype="nonsense")),
    "no shape": lambda a: _edited(a, lambda m: m["inputs"][0].update(shape="nonsense")),
    "newer schema": lambda a: _edited(a, lambda m: m.update(schema=99)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_artifact(damage: str, artifact: Path, tmp_path: Path) -> None:
    copy = tmp_path / "artifact"
    shutil.copytree(artifact, copy)
    DAMAGE[damage](copy)
    with pytest.raises(BadInput) as caught:
        trivium.load(str(copy))
    assert "\n" not in str(caught.value)


def test_every_key_of_the_manifest_is_checked(
    artifact: Path, tmp_path: Path, run_all: RunAll
) -> None:
    keys = list(json.loads((artifact / "manifest.json").read_text()))
    wrong: tuple[Any, ...] = (None, 7, "x", [], {})
    lines: list[Sequence[object]] = []
    for key in keys:
        for index, value in enumerate(wrong):
            copy = tmp_path / f"{key}{index}"
            shutil.copytree(artifact, copy)
            _edited(copy, lambda m, k=key, v=value: m.update({k: v}))  # type: ignore[misc]
            lines += [["run", copy], ["verify", copy], ["inspect", copy]]
    for answer in run_all(lines):
        assert answer.code in (0, 2, 4), answer


def test_every_file_is_checked(artifact: Path, tmp_path: Path) -> None:
    for index, name in enumerate(json.loads((artifact / "manifest.json").read_text())["files"]):
        copy = tmp_path / str(index)
        shutil.copytree(artifact, copy)
        data = bytearray((copy / name).read_bytes())
        data[len(data) // 2] ^= 1
        (copy / name).write_bytes(data)
        with pytest.raises(BadInput, match="checksum"):
            trivium.load(str(copy))
        (copy / name).unlink()
        with pytest.raises(BadInput, match="missing"):
            trivium.load(str(copy))


def test_an_artifact_of_another_backend(artifact: Path, tmp_path: Path) -> None:
    for name in ("fpga", "nonsense"):
        copy = tmp_path / name
        shutil.copytree(artifact, copy)
        _edited(copy, lambda m, n=name: m.update(backend=n))  # type: ignore[misc]
        with pytest.raises(BadInput):
            trivium.load(str(copy))


# --- what a target cannot take -------------------------------------------------------------------


def _of(nodes: Sequence[Any], path: Path) -> Path:
    """A model of nodes from x to y, both [n, m]."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", "m"]) for name in "xy"]
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("custom", 1)]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:])
    path.write_bytes(
        helper.make_model(graph, opset_imports=imports, ir_version=10).SerializeToString()
    )
    return path


def test_what_a_tpu_cannot_take(tmp_path: Path, run_all: RunAll) -> None:
    platforms = pytest.importorskip("trivium.backends.xla.platforms")
    if platforms.missing("tpu") is not None:
        pytest.skip(platforms.missing("tpu"))
    values = ["x", *(f"v{index}" for index in range(11)), "y"]
    strange = _of(
        [
            helper.make_node("Foo", [a], [b], name=f"foo{index}", domain="custom")
            for index, (a, b) in enumerate(pairwise(values))
        ],
        tmp_path / "strange.onnx",
    )
    plain = _of([helper.make_node("Relu", ["x"], ["y"])], tmp_path / "plain.onnx")
    recipe = tmp_path / "mesh.toml"
    table = 'name = "m"\ndescription = "d"\n[[pass]]\nname = "shard"\nmesh = "{}"\n'
    recipe.write_text(table.format("dp=4"))
    other = tmp_path / "other.toml"
    other.write_text(table.format("dp=3"))

    def line(model: Path, target: str, *more: object) -> list[object]:
        return ["compile", model, "--target", target, "--no-cache", "-o", tmp_path / "out", *more]

    sizes = ("--shape", "n=6", "m=4")
    refused, open_, slice_, uneven, smaller = run_all(
        [
            line(strange, "tpu-v5e", *sizes),
            line(plain, "tpu-v5e", "--shape", "n=6"),
            line(plain, "tpu-v5e:2x2", "--shape", "n=?", "m=4"),
            line(plain, "tpu-v5e:2x2", "--recipe", recipe, *sizes),
            line(plain, "tpu-v5e:2x2", "--recipe", other, *sizes),
        ]
    )
    assert refused.code == 3
    names = ", ".join(f"foo{index}" for index in range(12))
    assert f"cannot run 12 nodes: {names} (Foo): no lowering for custom.Foo" in refused.stderr
    assert [one.code for one in (open_, slice_, uneven, smaller)] == [2, 2, 2, 2]
    assert "x[m] is symbolic; bind them, e.g. --shape x=6x1" in open_.stderr
    assert "n is to stay symbolic; give it a size with --shape" in slice_.stderr
    assert "x, axis 0: a batch of 6 does not divide by dp=4; dp may be 1, 2, 3, 6" in uneven.stderr
    assert "annotated for dp=3,tp=1 (3 devices), and the target has 4 devices" in smaller.stderr
    assert "multiply to 4, e.g. dp=4" in smaller.stderr
    assert not (tmp_path / "out").exists()


# --- places --------------------------------------------------------------------------------------


def test_places_that_cannot_be_written(
    tiny: Path, artifact: Path, tmp_path: Path, run_all: RunAll
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.onnx").mkdir()
    compiled: list[object] = ["compile", tiny, "--target", "cpu", "--no-cache", "-o"]
    lines: list[Sequence[object]] = [
        [*compiled, tmp_path / "file"],
        [*compiled, tmp_path / "file" / "x"],
        [*compiled, tmp_path / ("n" * 300)],
        [*compiled, tmp_path / "/".join(["d" * 200] * 25)],
        [*compiled, tmp_path / "x\0y"],
        [*compiled, "/proc/x"],
        ["optimize", tiny, "-o", tmp_path / "folder.onnx"],
        ["optimize", tiny, "-o", tmp_path / ("n" * 300 + ".onnx")],
        ["optimize", tiny, "-o", "/proc/x.onnx"],
        ["run", artifact, "--output", tmp_path / "folder.onnx"],
        ["run", artifact, "--output", tmp_path / "no" / "y.npz"],
        ["compare", tiny, "--shape", "n=1", "--target", "cpu", "--html", tmp_path / "folder.onnx"],
    ]
    for answer in run_all(lines):
        assert answer.code == 2, answer
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.onnx"]


def test_a_full_disk(tiny: Path, artifact: Path, tmp_path: Path, run_all: RunAll) -> None:
    full = tmp_path / "full"
    full.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8k", "none", str(full)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("a small file system can only be mounted by root")
    try:
        (full / "pad").write_bytes(bytes(8192))
        lines: list[Sequence[object]] = [
            ["compile", tiny, "--target", "cpu", "--no-cache", "-o", full / "a"],
            ["compile", tiny, "--target", "cpu", "-o", tmp_path / "a"],
            ["compile", tiny, "--target", "cpu", "-o", full / "cached"],
            ["optimize", tiny, "-o", full / "o.onnx"],
            ["run", artifact, "--output", full / "y.npz"],
            ["compare", tiny, "--shape", "n=1", "--target", "cpu", "--html", full / "x.html"],
        ]
        answers = run_all(lines)
        assert [answer.code for answer in answers] == [5, 0, 5, 5, 5, 5], answers
        assert all("the disk is full" in a.stderr for a in answers if a.code)
        assert [path.name for path in full.iterdir()] == ["pad"]
    finally:
        subprocess.run(["umount", str(full)], check=True)


def test_permissions_are_named(tiny: Path, tmp_path: Path) -> None:
    """As another user, since root may do everything."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("needs root and setpriv, to become a user who may not")
    if not os.access(sys.prefix, os.X_OK):
        pytest.skip("the interpreter is out of reach of other users")
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents:
        if not parent.stat().st_mode & 0o001:
            pytest.skip(f"{parent} is closed to other users")
    locked, closed = tmp_path / "locked.onnx", tmp_path / "closed"
    shutil.copy(tiny, locked)
    locked.chmod(0)
    closed.mkdir(mode=0o555)
    opened = tmp_path / "open.onnx"
    shutil.copy(tiny, opened)
    opened.chmod(0o644)
    become = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    for arguments in (
        ["inspect", str(locked)],
        ["optimize", str(opened), "-o", f"{closed}/x.onnx"],
    ):
        done = subprocess.run(
            [*become, *TRIVIUM, *arguments], capture_output=True, text=True, check=False
        )
        if "No module named" in done.stderr:
            pytest.skip("the package is out of reach of other users")
        assert done.returncode == 2, done.stderr
        assert "ermission denied" in done.stderr


def test_output_that_nobody_takes() -> None:
    done = subprocess.run(
        f"{' '.join(TRIVIUM)} targets --json > /dev/full",
        shell=True,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 5
    assert done.stderr.startswith("trivium: No space left")


# --- what is not installed -----------------------------------------------------------------------

ABSENT = ("jax", "jaxlib", "libtpu", "tvm", "tensorrt", "torch", "transformers")

SITE = f"""
import sys
for name in {ABSENT!r}:
    sys.modules[name] = None
import importlib.metadata as metadata
find = metadata.Distribution.from_name.__func__
def from_name(cls, name):
    if name.replace("apache-", "") in {ABSENT!r}:
        raise metadata.PackageNotFoundError(name)
    return find(cls, name)
metadata.Distribution.from_name = classmethod(from_name)
"""


def test_nothing_is_installed(
    tiny: Path, tmp_path: Path, run_all: RunAll, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(SITE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    common: list[object] = ["compile", tiny, "--shape", "n=1", "-o", tmp_path / "out", "--target"]
    doctor, backends, *compiles = run_all(
        [
            ["doctor", "--json"],
            ["backends", "--json"],
            [*common, "cpu", "--backend", "xla"],
            [*common, "tpu-v5e:1x1"],
            [*common, "cpu", "--backend", "tvm"],
        ]
    )
    extras = {row["extra"]: row for row in json.loads(doctor.stdout)["extras"]}
    assert not extras["tpu"]["complete"]
    assert "trivium[tvm]" in extras["tvm"]["command"]
    here = {row["name"]: row["available"] for row in json.loads(backends.stdout)}
    assert here["onnxruntime"]
    assert not here["xla"]
    assert not here["tvm"]
    for answer in compiles:
        assert answer.code == 4, answer
        assert "pip install 'trivium[" in answer.stderr
    assert not (tmp_path / "out").exists()


def test_onnxruntime_keeps_to_itself(artifact: Path, tmp_path: Path) -> None:
    """Its wheels report to their maker, and leave an identifier behind, unless told not to."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("ORT_", "XDG_"))}
    done = subprocess.run(
        [*TRIVIUM, "run", str(artifact)],
        env={**environment, "HOME": str(tmp_path), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not any(tmp_path.iterdir())
