"""``targets``, ``backends``, ``passes``, ``doctor`` and ``cache``."""

from __future__ import annotations

import argparse
import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

from trivium.compiler import cache as artifact_cache
from trivium.compiler import plugins, recipe
from trivium.compiler import targets as target_names
from trivium.compiler.backend import Backend
from trivium.compiler.commands import console
from trivium.compiler.options import options_of as backend_options


def targets(arguments: argparse.Namespace) -> int:
    """List the devices, or show one with every figure and its source."""
    if arguments.name:
        target = target_names.find(arguments.name)
        if arguments.json:
            console.print_json(asdict(target))
            return 0
        facts = {k: v for k, v in asdict(target).items() if k not in ("sources", "notes")}
        console.print_facts(facts)
        for figure, source in target.sources.items():
            print(f"  {figure}: {source}")
        for note in target.notes:
            print(f"  note: {note}")
        return 0
    found = [target_names.find(name) for name in target_names.names()]
    if arguments.json:
        console.print_json([asdict(target) for target in found])
        return 0
    rows = []
    for t in found:
        peak = max(t.peak_ops.items(), key=lambda item: item[1], default=None)
        rows.append(
            (
                t.name,
                t.family,
                ", ".join(t.backends),
                f"{console.si(peak[1], 'op/s')} {peak[0]}" if peak else "-",
                console.size(t.memory_bytes),
                console.si(t.memory_bytes_per_s, "B/s"),
                console.si(t.watts, "W"),
            )
        )
    columns = ("target", "family", "backends", "peak", "memory", "bandwidth", "power")
    console.print_table(columns, rows)
    return 0


def backends(arguments: argparse.Namespace) -> int:
    """List the backends: whether they can build here, and if not, why; or show one's options."""
    if arguments.name:
        one = _backend(arguments.name)
        if arguments.json:
            console.print_json(one)
            return 0
        console.print_facts({**one, "options": None, "toolchain": _versions(one)})
        options = [
            (o["name"], o["values"], _shown(o["default"]), o["help"]) for o in one["options"]
        ]
        if options:
            console.print_table(("option", "values", "default", ""), options)
        return 0
    rows = [_backend(name) for name in plugins.names("trivium.backends")]
    if arguments.json:
        console.print_json(rows)
        return 0
    table = [
        (
            row["name"],
            "yes" if row["available"] else "no",
            row["reason"] or _versions(row),
        )
        for row in rows
    ]
    console.print_table(("backend", "here", "toolchain, or what is missing"), table)
    return 0


def _backend(name: str) -> dict[str, Any]:
    """What there is to say of a backend."""
    backend: Backend = plugins.get("trivium.backends", name)
    missing = backend.available()
    return {
        "name": name,
        "available": missing is None,
        "reason": missing,
        "toolchain": backend.toolchain() if missing is None else {},
        "options": [
            {
                "name": option.shown,
                "values": option.kind.wanted,
                "default": option.default,
                "help": option.help,
            }
            for option in backend_options(backend)
        ],
    }


def _versions(row: dict[str, Any]) -> str:
    return ", ".join(f"{package} {release}" for package, release in row["toolchain"].items())


def _shown(default: Any) -> str:
    if isinstance(default, float):
        return f"{default:g}"
    return "" if default is None else str(default).lower()


def passes(arguments: argparse.Namespace) -> int:
    """List passes and recipes, or show one of either."""
    from trivium.compiler.passing import options_of

    if arguments.name in plugins.names("trivium.recipes"):
        chosen = recipe.read(arguments.name)
        text = recipe.lock(chosen, seed=0, model_sha256="", calibration=None)
        if arguments.json:
            console.print_json({"recipe": asdict(chosen)})
        else:
            print(text.partition("[lock]")[0].strip())
        return 0
    if arguments.name:
        cls = plugins.get("trivium.passes", arguments.name)
        options = [asdict(option) for option in options_of(cls)]
        described = {"name": arguments.name, "preserves": cls.preserves, "options": options}
        if arguments.json:
            console.print_json({**described, "description": cls.__doc__})
            return 0
        print(f"{arguments.name} ({cls.preserves})\n\n{(cls.__doc__ or '').strip()}\n")
        rows = [
            (o["name"], str(o["default"]), o["help"], ", ".join(map(str, o["choices"])))
            for o in options
        ]
        console.print_table(("option", "default", "", "choices"), rows)
        return 0
    found = {name: plugins.get("trivium.passes", name) for name in plugins.names("trivium.passes")}
    recipes = {name: recipe.read(name) for name in plugins.names("trivium.recipes")}
    if arguments.json:
        console.print_json(
            {
                "passes": {name: {"preserves": cls.preserves} for name, cls in found.items()},
                "recipes": {name: one.description for name, one in recipes.items()},
            }
        )
        return 0
    first_lines = [(n, c.preserves, (c.__doc__ or "").split("\n")[0]) for n, c in found.items()]
    console.print_table(("pass", "preserves", ""), first_lines)
    table = [(name, one.preserves, one.description) for name, one in recipes.items()]
    console.print_table(("recipe", "preserves", ""), table)
    return 0


def doctor(arguments: argparse.Namespace) -> int:
    """Say what is installed, and what each missing extra would add and how to get it."""
    extras = _extras()
    rows = []
    for extra, needs in extras.items():
        missing = [need for need in needs if _installed(need) is None]
        found = {need: found for need in needs if (found := _installed(need)) is not None}
        rows.append(
            {
                "extra": extra,
                "complete": not missing,
                "installed": found,
                "missing": missing,
                "adds": _ADDS.get(extra, ""),
                "command": f"pip install 'trivium[{extra}]'" if missing else None,
            }
        )
    core = {name: _installed(name) for name in _needs(None)}
    machine = {"python": platform.python_version(), "machine": platform.machine()}
    if arguments.json:
        console.print_json({"machine": machine, "core": core, "extras": rows})
        return 0
    print(f"python {machine['python']} on {machine['machine']}")
    print("core: " + ", ".join(f"{name} {found or 'MISSING'}" for name, found in core.items()))
    table = [
        (
            str(row["extra"]),
            "installed" if row["complete"] else str(row["command"]),
            str(row["adds"]),
        )
        for row in rows
    ]
    console.print_table(("extra", "", "what it adds"), table)
    return 0


_ADDS = {
    "tpu": "TPU slices, compiled ahead of time with libtpu; XLA on this CPU",
    "gpu": "NVIDIA GPUs, compiled ahead of time with XLA; XLA on this CPU",
    "tvm": "TVM on this CPU, and CUDA cubins where nvcc is installed",
    "fpga": "nothing to install: Vitis HLS projects, simulated with g++",
    "tensorrt": "TensorRT engines, built on the machine that has the GPU (not part of all)",
    "torch-xla": "PyTorch/XLA beside Trivium; no backend uses it yet (not part of all)",
    "openvino": "OpenVINO on this CPU",
    "hf": "tokenizers and chat templates for checkpoint folders",
    "vision": "images from files, for models that see (trivium generate --image)",
    "serve": "generators over HTTP (trivium serve)",
    "tune": "training back what a recipe cost (trivium tune), and explain's budgets",
    "torch": "PyTorch and transformers, which the tests compare with (not part of all)",
    "all": "every extra above but tensorrt, torch-xla and torch",
    "dev": "what the tests, the linters and the benchmarks need",
}


def _extras() -> dict[str, list[str]]:
    return {extra: _needs(extra) for extra in _ADDS}


def _needs(extra: str | None) -> list[str]:
    """The packages of an extra (of the core for None), extras within it spelled out."""
    import re

    found: list[str] = []
    for line in requires("trivium") or []:
        text, _, marker = line.partition(";")
        of = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", marker)
        if (of.group(1) if of else None) != extra:
            continue
        name = re.match(r"[A-Za-z0-9._-]+", text.strip())
        inner = re.search(r"\[([^]]+)]", text)
        if name and name.group() == "trivium" and inner:
            for one in inner.group(1).split(","):
                found += _needs(one.strip())
        elif name:
            found.append(name.group())
    return list(dict.fromkeys(found))


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cache(arguments: argparse.Namespace) -> int:
    """Show or clear the artifacts that are kept."""
    if arguments.clear:
        freed = artifact_cache.clear()
        if arguments.json:
            console.print_json({"folder": str(artifact_cache.folder()), "freed_bytes": freed})
        else:
            print(f"freed {console.size(freed)}")
        return 0
    kept = artifact_cache.entries()
    total = sum(count for _, count in kept)
    if arguments.json:
        console.print_json(
            {"folder": str(artifact_cache.folder()), "entries": len(kept), "bytes": total}
        )
    else:
        print(f"{artifact_cache.folder()}: {len(kept)} artifacts, {console.size(total)}")
    return 0
