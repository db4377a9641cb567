"""How right the cost models have been: ``docs/accuracy.md``, from published measurements.

    python -m benchmarks.accuracy [--print]

Every row is scored by coefficients that were fitted without it: without its device, without the
family (generation) of its device, or with thirty other points of the device. What is scored is
never fitted on, and the devices' own figures that stem from the same tables (launch times) are not
used. Without the data the page is left as it is, and the reason is printed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks import baselines, dpu, fitting, measured, mlperf, scores, whole
from benchmarks.fit_calibrations import JOBS, ROWS, Job
from benchmarks.fitting import Coefficients, Formula, Table
from benchmarks.scores import Score
from trivium.compiler.calibration import spread_of

PAGE = Path(__file__).parents[1] / "docs" / "accuracy.md"

TESTED = 2000
"""Rows that a device is scored on, drawn at random from those that nothing is fitted on."""

TITLES = {
    "product": "GEMM, bfloat16",
    "product_float8": "GEMM, float8 with activations quantized",
    "product_float32": "GEMM, float32 (linear and batched)",
    "prefill": "attention, prefill",
    "decode": "attention, paged decode",
    "stream": "elementwise, softmax, layer normalization",
    "collective_nvlink": "collectives over NVLink",
    "collective_pcie": "collectives over PCI Express",
}


@dataclass(frozen=True)
class Judged:
    """A kind of kernel: by device and way of fitting, how far the predictions were off."""

    name: str
    scores: Mapping[str, Mapping[str, Score]]
    families: Mapping[str, str]


def judge(name: str, job: Job) -> Judged:
    """Score one formula on every device, fitted without it."""
    halves = [table.halves(ROWS, TESTED) for table in job.tables()]
    trains, tests = [a for a, _ in halves], [b for _, b in halves]
    fits = [fitting.own(job.formula, train) for train in trains]
    simple = [fitting.own(baselines.THREE, train) for train in trains]
    found: dict[str, dict[str, Score]] = {}
    for index, test in enumerate(tests):
        others = [at for at in range(len(tests)) if at != index]
        strangers = [at for at in others if trains[at].family != test.family]
        row = {"raw roofline": scores.of(test.seconds, baselines.raw(test), None)}
        if strangers:
            away = _mean(simple, strangers)
            row["3-parameter roofline"] = _score(baselines.THREE, test, away, None)
            row["device left out"] = _left_out(job.formula, tests, fits, others, test)
            row["family left out"] = _left_out(job.formula, tests, fits, strangers, test)
        prior = _mean(fits, others) if others else dict(job.formula.start)
        row["30 points"] = _with_few(job.formula, trains[index], test, prior)
        row["shipped"] = _shipped(job.formula, trains, index, test, fits)
        found[test.target.name] = row
    return Judged(name, found, {test.target.name: test.family for test in tests})


def _mean(fits: Sequence[Coefficients], which: Sequence[int]) -> dict[str, float]:
    return fitting.family([fits[index] for index in which])


def _score(formula: Formula, test: Table, c: Coefficients, spread: float | None) -> Score:
    return scores.of(test.seconds, formula.predict(test, c), spread)


def _left_out(
    formula: Formula,
    tests: Sequence[Table],
    fits: Sequence[Coefficients],
    which: Sequence[int],
    test: Table,
) -> Score:
    """The interval is what the devices that are left say of one another."""
    spread = fitting.spread_between(
        formula, [tests[index] for index in which], [fits[index] for index in which]
    )
    return _score(formula, test, _mean(fits, which), spread)


def _with_few(formula: Formula, train: Table, test: Table, prior: Coefficients) -> Score:
    """The mean of three draws of thirty; the interval from fits on two thirds of each."""
    drawn = [
        _score(
            formula,
            test,
            fitting.few(formula, train, prior, seed),
            fitting.spread_of_few(formula, train, prior, seed),
        )
        for seed in range(3)
    ]
    return scores.mean(drawn)


def _shipped(
    formula: Formula,
    trains: Sequence[Table],
    index: int,
    test: Table,
    fits: Sequence[Coefficients],
) -> Score:
    """As `benchmarks.fit_calibrations` does: on other rows of the same device."""
    shared = fitting.family(fits)
    half = len(test) // 2
    first, second = test.take(np.arange(half)), test.take(np.arange(half, len(test)))
    c = fitting.fit(formula, [trains[index]], shared, formula.device, pull=0.02)
    spread = spread_of(fitting.residuals(formula, first, c).tolist())
    return _score(formula, second, c, spread)


# --- choosing a device ---------------------------------------------------------------------------


def choices(name: str, job: Job, keys: Sequence[str]) -> tuple[float, float, int]:
    """Top-1 choice and mean regret among devices, each predicted without its own measurements."""
    tables = job.tables()
    fits = [fitting.own(job.formula, table.halves(ROWS, 1)[0]) for table in tables]
    rows = [
        {tuple(table.columns[key][i] for key in keys): i for i in range(len(table))}
        for table in tables
    ]
    common = sorted(set.intersection(*(set(one) for one in rows)))
    order = np.random.default_rng(1).permutation(len(common))[:TESTED]
    times, guesses = [], []
    for index, table in enumerate(tables):
        picked = table.take(np.array([rows[index][common[at]] for at in order]))
        away = _mean(fits, [at for at in range(len(tables)) if at != index])
        times.append(picked.seconds)
        guesses.append(job.formula.predict(picked, away))
    actual, guessed = np.array(times), np.array(guesses)
    chosen = np.take_along_axis(actual, guessed.argmin(0)[None], 0)[0]
    best = actual.min(0)
    return (
        float((guessed.argmin(0) == actual.argmin(0)).mean()),
        float((chosen / best - 1.0).mean()),
        len(order),
    )


# --- whole models --------------------------------------------------------------------------------


def judge_whole(rows: Sequence[whole.Row]) -> dict[str, Score]:
    """Each group of rows by an engine's coefficients that were fitted without the group."""
    table = whole.table(rows)
    formula = whole.ENGINES[table.source]
    groups = sorted(set(table.columns["group"].tolist()))
    guesses = np.zeros(len(table))
    spreads = np.zeros(len(table))
    found: dict[str, Score] = {}
    for group in groups:
        inside = table.columns["group"] == group
        rest = table.take(np.flatnonzero(~inside))
        mine = table.take(np.flatnonzero(inside))
        coefficients = whole.fit(rest)
        spread = whole.spread_between_groups(rest)
        guesses[inside] = formula.predict(mine, coefficients)
        spreads[inside] = spread
        found[f"without {group}"] = scores.of(mine.seconds, guesses[inside], spread)
    whole_score = scores.of(table.seconds, guesses, spreads)
    return {"all, each group left out": whole_score, **found}


# --- the page ------------------------------------------------------------------------------------


HEAD = """
Generated by `python -m benchmarks.accuracy` from published measurements, which are not part of the
project; `benchmarks/measured.py` says where each is from. Nothing below was fitted on what it is
scored on.

- *Device left out*: coefficients are the mean of the other devices'. *Family left out*: also
  without devices of the same generation.
- *30 points*: the six coefficients that `trivium calibrate --from` may change, fitted to thirty
  rows of the device, spread from the shortest to the longest as that command spreads them.
- *Shipped*: the coefficients in `targets/calibrations`, on other rows of the same tables.
- The 3-parameter roofline (a launch, a share of either rate) is fitted without the family.

MAPE is the mean of |predicted / measured - 1|, tau is Kendall's, coverage is how often the 80%
interval holds the measurement (it should be 75 to 90%).
"""

WHOLE_HEAD = """
The kernels of each model by the formulas above with the coefficients that ship, and on NeuSight's
GPUs with those of the float32 kernels that were measured on them (on AMD's only elementwise);
what the engine adds (seconds of a call, the pace of its own kernels) is fitted without the group in
question.
"""


def page() -> str:
    """The whole page."""
    judged = [judge(name, job) for name, job in JOBS.items()]
    lines = [
        "# Accuracy of the cost models",
        "",
        *HEAD.strip().split("\n"),
        "",
        "## Kernels",
        "",
        "Means over the devices, each weighing the same.",
        "",
        "| kind | way | devices | MAPE | median | P90 | tau | coverage |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in judged:
        for way in scores.WAYS:
            each = [row[way] for row in one.scores.values() if way in row]
            if each:
                cells = (TITLES[one.name], way, str(len(each)), *scores.cells(scores.mean(each)))
                lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "## By device", "", *_by_device(judged), "", "## Choosing among devices", ""]
    lines += [
        "Each device predicted without its own measurements; regret is the time of the one chosen",
        "over that of the best, less one.",
        "",
        "| kind | shapes | best chosen | mean regret |",
        "|---|---|---|---|",
    ]
    for name, keys in (
        ("product", "mnk"),
        ("prefill", ("batch", "queries", "heads", "kv_heads")),
        ("decode", ("batch", "keys", "heads", "kv_heads")),
    ):
        top, regret, count = choices(name, JOBS[name], tuple(keys))
        lines.append(f"| {TITLES[name]} | {count} | {top:.0%} | {regret:.1%} |")
    lines += ["", *_whole_models(), "", *_dpu(), "", *_memory()]
    return "\n".join(lines) + "\n"


def _by_device(judged: Sequence[Judged]) -> list[str]:
    ways = ("raw roofline", "3-parameter roofline", "device left out", "family left out")
    lines = [
        "MAPE by device and way; in brackets the coverage of the interval.",
        "",
        "| kind | device | family | " + " | ".join((*ways, "30 points", "shipped")) + " |",
        "|---|---|---|" + "---|" * 6,
    ]
    for one in judged:
        for device, row in one.scores.items():
            cells = [scores.short(row.get(way)) for way in (*ways, "30 points", "shipped")]
            head = (TITLES[one.name], device, one.families[device])
            lines.append("| " + " | ".join((*head, *cells)) + " |")
    return lines


WHOLE: Mapping[str, tuple[str, Callable[[], Sequence[whole.Row]]]] = {
    "TensorRT, BERT base and large on an A100, fp16 and int8": ("model", whole.tensorrt_bert),
    "PyTorch in float32, BERT, GPT-2, GPT-3 and OPT on seven GPUs (NeuSight)": (
        "device",
        whole.pytorch,
    ),
    "TensorRT-LLM, static batches and first tokens on A100, H100, L40S": (
        "device",
        whole.tensorrt_llm,
    ),
}


def _whole_models() -> list[str]:
    lines = [
        "## Whole models",
        "",
        *WHOLE_HEAD.strip().split("\n"),
        "",
        "| rows | left out | count | MAPE | median | P90 | tau | coverage |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for title, (what, rows) in WHOLE.items():
        for name, score in judge_whole(rows()).items():
            label = name if name.startswith("without") else f"**each {what}**"
            cells = (title, label, str(score.count), *scores.cells(score))
            lines.append("| " + " | ".join(cells) + " |")
    names, actual, guessed, spread = mlperf.rows()
    score = scores.of(actual, guessed, spread)
    title = "MLPerf Inference 4.1, ResNet-50 and BERT offline on five GPUs"
    row = (title, "nothing was fitted on it", str(score.count), *scores.cells(score))
    lines += [
        "| " + " | ".join(row) + " |",
        "",
        "MLPerf, predicted over measured time of a sample:",
    ]
    ratios = [f"{name} {g / a:.2f}" for name, a, g in zip(names, actual, guessed, strict=True)]
    lines += [f"- {ratio}" for ratio in ratios]
    return lines


DPU_HEAD = """
AMD's deep-learning processors on FPGA, by `compiler/machines/dpu.py`: pictures a second of Vitis AI
2.5's zoo, for networks that a paper describes in full. No backend of Trivium emits for a DPU, so
nothing of this is offered as a target; it says how far the formula carries. Each row is predicted
without any network of its kind (all residual ones, all of Inception, ...); the card's coefficients
are the mean of the other cards' with the same processor, either as they are or corrected by the
card's other rows. How many processing elements of a Versal share what, and its memory, are figures
recalled and not read again.
"""


def _dpu() -> list[str]:
    scored, published = dpu.scored()
    lines = [
        "## FPGA",
        "",
        *DPU_HEAD.strip().split("\n"),
        "",
        f"{scored} of the table's {published} figures are scored; the other networks (pruned, for",
        "detection or segmentation, of the zoo's own) are in no paper layer by layer.",
        "",
        "| card | left out | count | MAPE | median | P90 | tau | coverage |",
        "|---|---|---|---|---|---|---|---|",
    ]
    together: dict[str, list[tuple[fitting.Array, ...]]] = {}
    rows = []
    for card, ways in dpu.judge().items():
        for name, (table, way) in ways.items():
            parts = table.seconds, way.guesses, way.spreads
            together.setdefault(name, []).append(parts)
            rows.append((card, name, scores.of(*parts)))
    for name, found in together.items():
        columns = [np.concatenate(column) for column in zip(*found, strict=True)]
        rows.insert(0, ("**all**", name, scores.of(columns[0], columns[1], columns[2])))
    for card, name, score in rows:
        lines.append("| " + " | ".join((card, name, str(score.count), *scores.cells(score))) + " |")
    return lines


def _memory() -> list[str]:
    found = whole.fits_in_memory()
    precision, recall, count = scores.precision_and_recall(found)
    return [
        "## Out of memory",
        "",
        f"Of {count} pairs of model and device in NeuSight's tables, those without a published",
        "latency are taken not to have fitted. Saying that a model does not fit was right in",
        f"{precision:.0%} of the cases where it was said (precision), and was said in {recall:.0%}",
        "of the cases where it was so (recall).",
    ]


def main(arguments: Sequence[str]) -> int:
    """Write the page, or say why not."""
    reason = measured.why_absent()
    if reason is not None:
        print(f"skipped: {reason}")
        return 0
    text = page()
    if "--print" in arguments:
        print(text)
    else:
        PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
