"""Long benchmarks in pieces: each figure is a line of a file as soon as it is there.

TRIVIUM_BENCH_LINES names the file; what it holds already is not measured again, so that a run that
was killed goes on where it was. TRIVIUM_BENCH_ONLY, patterns joined by semicolons, limits what is
measured; the table is made of all the lines that there are.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

LINES = "TRIVIUM_BENCH_LINES"
ONLY = "TRIVIUM_BENCH_ONLY"


class Pieces:
    """Figures by name, in a file of one JSON object a line.

    Args:
        topic: The benchmark's name; one file may serve several.
    """

    def __init__(self, topic: str) -> None:
        self.topic = topic
        self.only = [word for word in os.environ.get(ONLY, "").split(";") if word]
        named = os.environ.get(LINES, "")
        self._temporary = None if named else tempfile.TemporaryDirectory()
        self.path = Path(named or Path(self._temporary.name if self._temporary else "", "lines"))
        self._known: dict[str, Any] = {}
        if self.path.is_file():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                entry = json.loads(line)
                if entry["topic"] == topic:
                    self._known[entry["name"]] = entry["figures"]

    def wants(self, name: str) -> bool:
        """Whether a piece is there, or is to be measured."""
        chosen = not self.only or any(fnmatchcase(name, pattern) for pattern in self.only)
        return name in self._known or chosen

    def of(self, name: str, measure: Callable[[], Any]) -> Any:
        """The figures of a piece (JSON), measured if need be; None where that was not asked for."""
        if name in self._known:
            return self._known[name]
        if not self.wants(name):
            return None
        started = time.perf_counter()
        figures = measure()
        entry = {
            "topic": self.topic,
            "name": name,
            "took_s": round(time.perf_counter() - started, 2),
            "figures": figures,
        }
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")
        print(f"{entry['took_s']:8.1f} s  {name}: {figures}", flush=True)
        self._known[name] = figures
        return figures
