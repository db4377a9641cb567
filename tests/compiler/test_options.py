"""Options of backends: read before the model is, refused by name and by value."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

import trivium
from trivium.compiler import build, plugins
from trivium.compiler.backend import Backend
from trivium.compiler.errors import BadInput
from trivium.compiler.options import Amount, OneOf, Option, Truth, Whole, options_of, values_of

OPTIONS = (
    Option("mode", OneOf(("fast", "small", "both")), "which way", "fast"),
    Option("fold", Truth(), "whether to fold"),
    Option("level", Whole(0, 1000), "how far", 3),
    Option("limit", Amount("seconds"), "how long"),
    Option("size.", Whole(1, 8), "of a dimension"),
)
BACKEND = cast(Backend, SimpleNamespace(name="toy", options=OPTIONS))
DEFAULTS = {"mode": "fast", "fold": None, "level": 3, "limit": None}


def test_what_is_not_given_has_its_default() -> None:
    given = {"mode": "small", "fold": "False", "level": "1000", "limit": "2e-3", "size.batch": "8"}
    read = {"mode": "small", "fold": False, "level": 1000, "limit": 0.002, "size.batch": 8}
    assert values_of(BACKEND, {}) == DEFAULTS
    assert values_of(BACKEND, given) == read


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("speed", "1", "the backend toy has no option 'speed'; it has mode, .*, size.NAME$"),
        ("size", "1", "no option 'size'"),
        ("mode", "Fast", "--option mode: 'Fast' is not what it takes; give fast, small or both"),
        ("fold", "yes", "give true or false"),
        ("level", "1001", "give a whole number from 0 to 1,000"),
        ("level", "-1", "give a whole number"),
        ("limit", "0", "give seconds, above 0"),
        ("limit", "inf", "give seconds, above 0"),
        ("limit", "nan", "give seconds, above 0"),
        ("limit", "soon", "give seconds, above 0"),
        ("size.batch", "", "--option size.batch: ''"),
    ],
)
def test_what_is_wrong_is_named(name: str, text: str, reason: str) -> None:
    with pytest.raises(BadInput, match=reason):
        values_of(BACKEND, {name: text})


@pytest.mark.parametrize("name", plugins.names("trivium.backends"))
def test_defaults_are_values_that_could_be_given(name: str) -> None:
    for option in options_of(plugins.get("trivium.backends", name)):
        if option.default is not None:
            spelled = str(option.default)
            assert option.kind.read(spelled) == option.default, option


@pytest.mark.parametrize("backend", ["onnxruntime", "tvm", "xla", "openvino"])
@pytest.mark.parametrize("make", [trivium.compile, build.dry_run])
def test_an_option_is_refused_before_the_model_is_read(
    make: Any, backend: str, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=f"the backend {backend} has no option 'speed'"):
        make(tmp_path / "none.onnx", "cpu", backend=backend, options={"speed": "11"})
