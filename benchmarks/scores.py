"""Figures of merit of predictions: what ``docs/accuracy.md`` and ``trivium track`` show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from trivium.compiler.calibration import Z80

Array = np.ndarray[Any, Any]

WAYS = (
    *("raw roofline", "3-parameter roofline", "device left out", "family left out"),
    *("30 points", "shipped"),
)


@dataclass(frozen=True)
class Score:
    """How far predictions were off.

    Attributes:
        mape, median, p90: Of |predicted / measured - 1|.
        tau: Kendall's, of predicted against measured.
        coverage: Share of measurements within the 80% interval; ``nan`` without one.
    """

    mape: float
    median: float
    p90: float
    tau: float
    coverage: float
    count: int = 0


def of(seconds: Array, guesses: Array, spread: float | Array | None) -> Score:
    """Score predictions whose log-residuals should have the given deviation."""
    from scipy.stats import kendalltau

    errors = np.abs(guesses / seconds - 1.0)
    coverage = float("nan")
    if spread is not None:
        off = np.abs(np.log(seconds / guesses))
        coverage = float((off <= Z80 * np.asarray(spread)).mean())
    tau = float(kendalltau(guesses, seconds).statistic) if len(seconds) > 1 else float("nan")
    return Score(
        float(errors.mean()),
        float(np.median(errors)),
        float(np.quantile(errors, 0.9)),
        tau,
        coverage,
        len(seconds),
    )


def mean(each: Sequence[Score]) -> Score:
    """The mean of several scores, each weighing the same."""
    values = {
        field.name: float(np.mean([getattr(one, field.name) for one in each]))
        for field in fields(Score)
        if field.name != "count"
    }
    return Score(**values, count=sum(one.count for one in each))


def cells(score: Score) -> tuple[str, ...]:
    """MAPE, median, P90, tau, coverage, as a table shows them."""
    coverage = "-" if np.isnan(score.coverage) else f"{score.coverage:.0%}"
    return (
        f"{score.mape:.1%}",
        f"{score.median:.1%}",
        f"{score.p90:.1%}",
        f"{score.tau:.2f}",
        coverage,
    )


def short(score: Score | None) -> str:
    """MAPE and coverage."""
    if score is None:
        return "-"
    coverage = "" if np.isnan(score.coverage) else f" ({score.coverage:.0%})"
    return f"{score.mape:.1%}{coverage}"


def precision_and_recall(pairs: Sequence[tuple[bool, bool]]) -> tuple[float, float, int]:
    """Of (said, so): how often what was said was so, and what was so was said."""
    said = [so for said, so in pairs if said]
    so = [said for said, so in pairs if so]
    return (
        sum(said) / len(said) if said else float("nan"),
        sum(so) / len(so) if so else float("nan"),
        len(pairs),
    )
