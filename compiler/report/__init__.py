"""The rows of a comparison or a plan for people and for tools.

`terminal` prints a table, `to_json` and `to_csv` are for tools, and `to_html` is one file that
stands alone: styles, scripts and the JSON are inside, and it asks the network for nothing.
"""

from __future__ import annotations

from trivium.compiler.report.html import explanation_html, to_html
from trivium.compiler.report.tables import document, terminal, to_csv, to_json

__all__ = ["document", "explanation_html", "terminal", "to_csv", "to_html", "to_json"]
