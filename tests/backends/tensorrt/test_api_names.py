"""Every name of TensorRT's API that is used exists in TensorRT 11.4, with those parameters."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from trivium.backends.tensorrt import backend

FOLDER = Path(backend.__file__).parent
SOURCES = [*sorted(FOLDER.glob("*.py")), *sorted((FOLDER / "scripts").glob("*.py"))]

# What the variables of the scripts hold; whatever is called on them is looked up in that class.
CLASSES = {
    "builder": "Builder",
    "cache": "ITimingCache",
    "config": "IBuilderConfig",
    "context": "IExecutionContext",
    "e": "ParserError",
    "engine": "ICudaEngine",
    "inspector": "EngineInspector",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "profile": "IOptimizationProfile",
    "runtime": "Runtime",
}


def scripts() -> list[Path]:
    return [path for path in SOURCES if path.parent.name == "scripts"]


def uses(tree: ast.AST) -> Iterator[tuple[str, str, ast.Call | None]]:
    """Yield (class, member, call) for what is used, the class "" for names of the module."""
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        call = calls.get(id(node))
        inner = node.value
        if isinstance(inner, ast.Name) and inner.id == "trt":
            yield "", node.attr, call
        elif isinstance(inner, ast.Name) and inner.id in CLASSES:
            yield CLASSES[inner.id], node.attr, call
        elif (
            isinstance(inner, ast.Attribute)
            and isinstance(inner.value, ast.Name)
            and inner.value.id == "trt"
        ):
            yield inner.attr, node.attr, call


def problems(text: str, api: dict[str, Any]) -> list[str]:
    """Return what a script uses and the API does not have."""
    found = []
    for owner, member, call in uses(ast.parse(text)):
        if not owner:
            if member not in api:
                found.append(f"trt.{member}")
            continue
        members = api[owner]["members"]
        if member not in members:
            found.append(f"{owner}.{member}")
            continue
        signatures = members[member] if isinstance(members, dict) else None
        if call is not None and isinstance(signatures, list):
            keywords = {str(keyword.arg) for keyword in call.keywords}
            if not any(
                keywords <= set(names) and len(call.args) + len(keywords) <= len(names)
                for names in signatures
            ):
                found.append(f"{owner}.{member}({', '.join(sorted(keywords))})")
    return found


@pytest.fixture(scope="module")
def api(shared_data: Callable[[str], Path]) -> dict[str, Any]:
    table: dict[str, Any] = json.loads(
        shared_data("tensorrt/api_names_11.4.json").read_text(encoding="utf-8")
    )["api"]
    return table


@pytest.mark.parametrize("path", scripts(), ids=lambda path: path.name)
def test_names_and_keywords_exist(path: Path, api: dict[str, Any]) -> None:
    text = path.read_text()
    assert len(list(uses(ast.parse(text)))) > 10
    assert problems(text, api) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("config.set_flag(trt.BuilderFlag.FP16)", "BuilderFlag.FP16"),
        ("builder.build_engine(network, config)", "Builder.build_engine"),
        ("trt.IInt8Calibrator", "trt.IInt8Calibrator"),
        ("profile.set_shape(x, minimum=a)", "IOptimizationProfile.set_shape(minimum)"),
        ("parser.parse_from_file(a, b)", "OnnxParser.parse_from_file()"),
        ("config.max_workspace_size", "IBuilderConfig.max_workspace_size"),
    ],
)
def test_what_version_11_lacks_is_found(text: str, problem: str, api: dict[str, Any]) -> None:
    assert problems(text, api) == [problem]


def test_no_other_file_uses_the_api_unchecked() -> None:
    """Names reached through other aliases would escape the check above."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name == "tensorrt":
                        assert alias.asname == "trt", path.name
                        assert path in scripts(), path.name


STUBS = {
    "libnvinfer.so.11": (
        "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL",
        "createInferRuntime_INTERNAL", "getBuilderPluginRegistry", "getPluginRegistry",
    ),
    "libnvonnxparser.so.11": (
        "createNvOnnxParser_INTERNAL", "createNvOnnxParserRefitter_INTERNAL",
        "getNvOnnxParserVersion",
    ),
    "libnvinfer_plugin.so.11": ("initLibNvInferPlugins",),
}  # fmt: skip


@pytest.mark.slow
def test_names_exist_in_the_real_bindings(tmp_path: Path) -> None:
    """The real bindings, imported over libraries that define their undefined symbols."""
    wheel = os.environ.get("TRIVIUM_TENSORRT_BINDINGS")
    if not wheel:
        pytest.skip("TRIVIUM_TENSORRT_BINDINGS names no wheel of tensorrt_cu13_bindings")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    for library, symbols in STUBS.items():
        source = tmp_path / f"{library}.c"
        source.write_text("".join(f"void* {symbol}(void) {{ return 0; }}\n" for symbol in symbols))
        subprocess.run(
            ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", tmp_path / library, source],
            check=True,
        )
    wanted = sorted({(o, m) for path in scripts() for o, m, _ in uses(ast.parse(path.read_text()))})
    check = (
        "import ctypes, json, sys, importlib.util\n"
        f"[ctypes.CDLL(p, ctypes.RTLD_GLOBAL) for p in {[str(tmp_path / n) for n in STUBS]}]\n"
        f"spec = importlib.util.spec_from_file_location('tensorrt', "
        f"{str(tmp_path / 'tensorrt_bindings' / 'tensorrt.so')!r})\n"
        "trt = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(trt)\n"
        f"missing = [f'{{o}}.{{m}}' for o, m in {wanted!r}\n"
        "           if not hasattr(getattr(trt, o) if o else trt, m)]\n"
        "print(json.dumps(missing))\n"
    )
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", check],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []
