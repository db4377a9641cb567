"""Measurements against peers, each in the same run: ``python -m benchmarks [NAME ...]``.

A module here has ``TITLE`` and ``rows() -> list[Row]``. Results go to ``docs/benchmarks.md`` with
the date, the machine and the versions; a module that is not run keeps its last results.
"""
