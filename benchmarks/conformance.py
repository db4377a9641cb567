"""Runs the ONNX backend suite through ``trivium.backends.xla.onnx_backend``, in memory.

    python benchmarks/conformance.py [--jobs N] [--kind node] [--match TEXT] [--every N] [--write]

Each test counts once, as

- ``run-time``: passes with every input an argument of the compiled program;
- ``baked``: passes with some inputs compiled in, because a shape depends on their values;
- ``fail``: anything else, with the first line of the reason.

Results go to a JSON lines file as they come; a run that was cut off goes on where it stopped.
``--write`` makes docs/conformance.md of it and the allow-list that tests/conformance holds us to.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ALLOWED = ROOT / "tests" / "conformance" / "allowed_failures.txt"
PAGE = ROOT / "docs" / "conformance.md"
KINDS = ("node", "simple", "pytorch-converted", "pytorch-operator")

NOT_CORE = re.compile(
    r"string|strnorm|regex|label_encoder|sequence|_seq|optional|_opt|bernoulli|random|dropout"
    r"|adagrad|adam|momentum|gradient|image_decoder|test_if|loop|scan|tfidf"
)
"""Tests outside the core: strings, sequences, optional, random, training, image, control flow."""


def cases(kind: str) -> list[Any]:
    """The tests of one kind, in the suite's own order."""
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(load_model_tests(kind=kind))


def outcome(case: Any) -> dict[str, str]:
    """Run one test; return its name, its ``status``, and the reason of a failure."""
    from onnx.backend.test.runner import Runner, _normalize_tensor

    from trivium.backends.xla import onnx_backend

    name = f"{case.kind}/{case.name}"
    status = "run-time"
    try:
        rep = onnx_backend.prepare(_model(case))
        for inputs, expected in _data_sets(case):
            actual = rep.run([_normalize_tensor(value) for value in inputs])
            Runner.assert_similar_outputs(
                [_normalize_tensor(value) for value in expected],
                actual,
                rtol=case.rtol,
                atol=case.atol,
                model_dir=case.model_dir,
            )
            status = "baked" if rep.baked else status
    except Exception as error:  # whatever a test raises is its result
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = f"{type(error).__name__}: {' '.join(lines[:3])[:160]}"
        return {"name": name, "status": "fail", "reason": reason}
    return {"name": name, "status": status}


def _model(case: Any) -> Any:
    import onnx

    if case.model is not None:
        return case.model
    return onnx.load(os.path.join(case.model_dir, "model.onnx"))


def _data_sets(case: Any) -> Iterator[tuple[list[Any], list[Any]]]:
    """Inputs and expected outputs: the case's own, or those in its folder."""
    if case.data_sets is not None:
        yield from case.data_sets
        return
    for folder in sorted(Path(case.model_dir).glob("test_data_set_*")):
        yield _protobufs(folder, "input"), _protobufs(folder, "output")


def _protobufs(folder: Path, stem: str) -> list[Any]:
    import onnx

    count = len(list(folder.glob(f"{stem}_*.pb")))
    files = [folder / f"{stem}_{index}.pb" for index in range(count)]
    return [onnx.TensorProto.FromString(file.read_bytes()) for file in files]


def allowed_failures() -> set[str]:
    """The tests that may fail; the list may only shrink."""
    lines = ALLOWED.read_text(encoding="utf-8").splitlines()
    return {line.split("  #")[0].strip() for line in lines if line and not line.startswith("#")}


def run(names: Iterable[str], results: Path, match: str, every: int, part: int, parts: int) -> None:
    """Run a share of the tests, appending to ``results``; those already there are left out."""
    import jax

    done = {row["name"] for row in read(results)}
    with results.open("a", encoding="utf-8") as stream:
        for kind in names:
            chosen = [case for case in cases(kind) if match in case.name][::every]
            for index, case in enumerate(chosen[part::parts]):
                if f"{case.kind}/{case.name}" in done:
                    continue
                stream.write(json.dumps(outcome(case)) + "\n")
                stream.flush()
                if index % 200 == 199:
                    jax.clear_caches()  # type: ignore[no-untyped-call]


def read(path: Path) -> list[dict[str, str]]:
    """Results so far, from a file and its parts."""
    rows: list[dict[str, str]] = []
    for file in sorted(path.parent.glob(path.name + "*")):
        rows += [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return list({row["name"]: row for row in rows}.values())


def page(rows: list[dict[str, str]]) -> str:
    """The results as a Markdown page."""
    import jax
    import onnx

    out = [
        "# ONNX conformance of the XLA backend",
        "",
        f"The backend suite of onnx {onnx.__version__} through "
        f"`trivium.backends.xla.onnx_backend`, jax {jax.__version__} on the CPU, at the suite's "
        "own tolerances. Made by "
        "`python benchmarks/conformance.py --write`.",
        "",
        "*Run time*: every input is an argument of the compiled program. *Baked*: a shape depends "
        "on the value of an input (or the input is a string), so it was compiled in; what is then "
        "known altogether is computed by onnx's own reference, not by XLA. *Core* leaves out "
        "strings, sequences, optionals, random numbers, training, image decoding and control flow.",
        "",
        "| suite | tests | run time | baked | fail |",
        "|---|---|---|---|---|",
    ]
    groups = {kind: [r for r in rows if r["name"].startswith(kind + "/")] for kind in KINDS}
    groups["node, core"] = [r for r in groups["node"] if not NOT_CORE.search(r["name"])]
    groups["node, `_expanded`"] = [r for r in groups["node"] if "_expanded" in r["name"]]
    for title, group in groups.items():
        count = Counter(row["status"] for row in group)
        cells = (len(group), count["run-time"], count["baked"], count["fail"])
        out.append(f"| {title} | " + " | ".join(map(str, cells)) + " |")
    out += ["", "## What fails, and why", ""]
    out += [f"- `{r['name']}`: {r['reason']}" for r in rows if r["status"] == "fail"]
    out += ["", "## What needs values baked in", ""]
    out += [f"- `{r['name']}`" for r in rows if r["status"] == "baked"]
    return "\n".join(out) + "\n"


def main() -> None:
    """Parse the arguments, run in as many processes as asked, and write what was asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--kind", nargs="*", default=list(KINDS), choices=KINDS)
    parser.add_argument("--match", default="")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--results", type=Path, default=ROOT / ".conformance.jsonl")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if given.part is not None:
        own = given.results.with_name(f"{given.results.name}.{given.part}")
        own.touch()
        run(given.kind, own, given.match, given.every, given.part, given.jobs)
        return
    command = [sys.executable, __file__, *sys.argv[1:]]
    processes = [subprocess.Popen([*command, "--part", str(part)]) for part in range(given.jobs)]
    for process in processes:
        process.wait()
    rows = sorted(read(given.results), key=lambda row: row["name"])
    print(dict(Counter(row["status"] for row in rows)))
    if given.write:
        PAGE.write_text(page(rows), encoding="utf-8")
        failed = [f"{r['name']}  # {r['reason']}" for r in rows if r["status"] == "fail"]
        ALLOWED.write_text("\n".join([ALLOWED_HEAD, *failed]) + "\n", encoding="utf-8")


ALLOWED_HEAD = """\
# Tests of the ONNX backend suite that may fail, with the reason. The list may only shrink: a test
# that is here and passes fails the run. Made by: python benchmarks/conformance.py --write"""


if __name__ == "__main__":
    main()
