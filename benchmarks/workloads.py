"""Models that the benchmarks measure, or None with a word on standard error where one is absent."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("TRIVIUM_TEST_DATA", ROOT.parent / "shared" / "data"))


def shared(name: str) -> Path | None:
    """A file of the test data."""
    path = DATA / name
    if path.exists():
        return path
    print(f"no {name} in {DATA}: left out (set TRIVIUM_TEST_DATA)", file=sys.stderr)
    return None
