"""HTML files that stand alone, from the templates, the style and the scripts beside this file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING, Any

import trivium
from trivium.compiler.report.tables import document

if TYPE_CHECKING:
    from trivium.compiler.report.tables import Result


def to_html(result: Result) -> str:
    """Return the page of a comparison or a plan."""
    return _page("page", document(result))


def explanation_html(explanation: Mapping[str, Any]) -> str:
    """Return the page of what ``trivium explain --json`` prints."""
    return _page("explain", explanation)


def _page(name: str, shown: Mapping[str, Any]) -> str:
    """A page that shows what its embedded JSON says and loads nothing."""
    folder = files("trivium.compiler.report")

    def part(file: str) -> str:
        return (folder / file).read_text(encoding="utf-8")

    # A "<" of a node's name could end the script element that carries the JSON.
    data = json.dumps(shown, allow_nan=False).replace("<", "\\u003c")
    body = Template(part(f"{name}.html")).substitute(version=trivium.__version__)
    return Template(part("frame.html")).substitute(
        style=part("page.css"),
        body=body,
        data=data,
        scripts="\n".join(part(file) for file in ("charts.js", "common.js", f"{name}.js")),
        version=trivium.__version__,
    )
