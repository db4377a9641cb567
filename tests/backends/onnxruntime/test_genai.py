"""onnxruntime-genai loads and runs the very folder that a compile leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

import trivium
from benchmarks import checkpoints

og = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")

PROMPT = [5, 6, 7, 8]


@pytest.mark.parametrize("recipe", ["none", "int4"])
def test_greedy_tokens_are_those_of_the_artifact(recipe: str, tmp_path: Path) -> None:
    source = checkpoints.write(tmp_path, "1M")
    artifact = trivium.compile(source, "cpu", recipe=recipe, out=tmp_path / "out", use_cache=False)
    length = 40
    model = og.Model(str(artifact.path))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=length, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens([PROMPT])
    while not generator.is_done():
        generator.generate_next_token()
    theirs = [int(token) for token in generator.get_sequence(0)]

    decoder = artifact.load().generator()  # type: ignore[attr-defined]
    assert decoder.generator.form == "ragged"
    cache, ours, fed = decoder.start(1, length), list(PROMPT), PROMPT
    while len(ours) < length and ours[-1] not in decoder.generator.eos:
        fed = [int(decoder.feed(cache, [fed])[0, -1].argmax())]
        ours += fed
    assert theirs == ours
    assert len(set(ours)) > 4
