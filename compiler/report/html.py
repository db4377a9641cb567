"""One HTML file that stands alone, from the template, style and scripts beside this file."""

from __future__ import annotations

import json
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING

import trivium
from trivium.compiler.report.tables import document

if TYPE_CHECKING:
    from trivium.compiler.report.tables import Result


def to_html(result: Result) -> str:
    """Return the page. It shows what its embedded JSON says and loads nothing."""
    folder = files("trivium.compiler.report")

    def part(name: str) -> str:
        return (folder / name).read_text(encoding="utf-8")

    # A "<" of a node's name could end the script element that carries the JSON.
    data = json.dumps(document(result), allow_nan=False).replace("<", "\\u003c")
    return Template(part("page.html")).substitute(
        style=part("page.css"),
        data=data,
        charts=part("charts.js"),
        page=part("page.js"),
        version=trivium.__version__,
    )
