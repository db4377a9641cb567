"""Text in and text out: tokenizers, streams, stop texts, chat templates, and the verb."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("tokenizers", reason="tokenizers is not installed (pip install 'trivium[hf]')")

import trivium
from trivium.compiler import cli
from trivium.compiler.artifact import Artifact
from trivium.compiler.errors import BadInput
from trivium.compiler.generation.sampling import Settings
from trivium.compiler.generation.text import TextGenerator
from trivium.compiler.generation.tokenizer import StopTexts, Tokenizer


@pytest.fixture(scope="module")
def tokenizer(shakespeare: Artifact) -> Tokenizer:
    return Tokenizer(shakespeare)


@given(text=st.text(max_size=40))
def test_stream_gives_the_text_of_all_tokens(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text, special=False)
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in tokens]
    assert "".join(pieces) + stream.finish() == tokenizer.decode(tokens) == text
    assert not any("\ufffd" in piece for piece in pieces if "\ufffd" not in text)


def test_characters_of_many_bytes_come_whole(tokenizer: Tokenizer) -> None:
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in tokenizer.encode("床前明月光", special=False)]
    assert len(pieces) > 5
    assert [piece for piece in pieces if piece] == list("床前明月光")


@given(
    pieces=st.lists(st.text("ab", max_size=4), max_size=8),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_stop_texts_end_the_output(pieces: list[str], stops: list[str]) -> None:
    watch, out, stopped = StopTexts(stops), "", False
    for piece in pieces:
        more, stopped = watch.push(piece)
        out += more
        if stopped:
            break
    out += "" if stopped else watch.finish()
    whole = "".join(pieces)
    if not stopped:
        assert out == whole
        assert not any(stop in whole for stop in stops)
    else:
        assert whole.startswith(out)
        assert any(whole[len(out) :].startswith(stop) for stop in stops)
        assert not any(stop in out for stop in stops)


def test_generation_stops_before_a_stop_text(shakespeare: Artifact) -> None:
    generator = TextGenerator(shakespeare)
    whole = generator.complete(["ROMEO:"], Settings(max_new_tokens=40))[0]
    assert whole.text is not None
    assert "awhile" in whole.text
    (cut,) = generator.complete(["ROMEO:"], Settings(max_new_tokens=40, stop=("awhile",)))
    assert cut.text == whole.text.partition("awhile")[0]
    assert (cut.finish_reason, whole.finish_reason) == ("stop", "length")


def test_pieces_put_together_are_the_completion(shakespeare: Artifact) -> None:
    generator = TextGenerator(shakespeare)
    asked = Settings(max_new_tokens=30, temperature=0.9)
    texts = ["", ""]
    for piece in generator.stream(["ROMEO:", "JULIET:\nO"], asked):
        texts[piece.index] += piece.text
    assert texts == [one.text for one in generator.complete(["ROMEO:", "JULIET:\nO"], asked)]


def test_caller_that_stops_reading_cancels(shakespeare: Artifact) -> None:
    generator = TextGenerator(shakespeare)
    stream = generator.stream(["ROMEO:"], Settings(max_new_tokens=400))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    generator.engine.step()
    assert not generator.engine.busy


CHAT = (
    "{% for m in messages %}{{ bos_token }}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def with_template(template: str, folder: Path, out: Path) -> Artifact:
    copy = out / "folder"
    shutil.copytree(folder, copy)
    for file in copy.iterdir():
        file.chmod(0o644)
    options = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps(options | {"chat_template": template}))
    return trivium.compile(copy, "cpu", out=out / "artifact")


def test_chat_template_is_carried_and_rendered(
    shared_data: Callable[[str], Path], tmp_path: Path
) -> None:
    artifact = with_template(CHAT, shared_data("llm-shakespeare"), tmp_path)
    assert artifact.generator is not None
    assert artifact.generator.chat_template == "chat_template.jinja"
    tokenizer = Tokenizer(artifact)
    messages = [{"role": "user", "content": "Speak."}]
    assert tokenizer.render(messages) == "<|endoftext|>user: Speak.\nassistant:"
    tokens = tokenizer.chat(messages)
    assert tokens[0] == 0
    assert tokenizer.decode(tokens) == "user: Speak.\nassistant:"


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__[1] }}",
        "{{ raise_exception('no') }}",
        "{% for %}",
        "{{ 1 / 0 }}",
    ],
)
def test_template_that_fails_is_one_line(
    template: str, shared_data: Callable[[str], Path], tmp_path: Path
) -> None:
    tokenizer = Tokenizer(with_template(template, shared_data("llm-shakespeare"), tmp_path))
    with pytest.raises(BadInput, match="the chat template fails"):
        tokenizer.render([{"role": "user", "content": "x"}])


def with_tokenizer(
    change: Callable[[dict[str, Any]], object], source: Path, tmp_path: Path
) -> Path:
    """A copy of a checkpoint folder with its tokenizer changed."""
    folder = tmp_path / "folder"
    shutil.copytree(source, folder)
    path = folder / "tokenizer.json"
    path.chmod(0o644)
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    return folder


def grown(document: dict[str, Any]) -> None:
    document["model"]["vocab"]["more"] = 1024


def begun_with_another(document: dict[str, Any]) -> None:
    """Every text begins with an added token that the model does not have."""
    document["added_tokens"].append({**document["added_tokens"][0], "id": 1030, "content": "<s>"})
    document["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                   {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1030], "tokens": ["<s>"]}},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "token"), [(grown, 1024), (begun_with_another, 1030)], ids=["grown", "begun"]
)
@pytest.mark.parametrize("architectures", [True, False])
def test_tokenizer_that_does_not_match_is_refused_by_the_compile(
    change: Callable[[dict[str, Any]], object],
    token: int,
    architectures: bool,
    shared_data: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = with_tokenizer(change, shared_data("llm-shakespeare"), tmp_path)
    if not architectures:  # then it is told where the graph turns out to be a decoder
        config = json.loads((folder / "config.json").read_text())
        del config["architectures"]
        (folder / "config.json").chmod(0o644)
        (folder / "config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    code = cli.main(["compile", str(folder), "--target", "cpu", "--no-cache", "-o", str(out)])
    assert code == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert f"has the token {token}, and the model a vocabulary of 1024" in told
    assert not out.exists()


def test_damaged_tokenizer_is_refused_by_the_compile(
    shared_data: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = with_tokenizer(lambda document: document.pop("model"), shared_data("llm-shakespeare"),
                            tmp_path)  # fmt: skip
    with pytest.raises(BadInput, match="not a tokenizer"):
        trivium.compile(folder, "cpu", out=tmp_path / "out")


def test_plain_forward_pass_needs_no_tokenizer(
    shared_data: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = with_tokenizer(grown, shared_data("llm-shakespeare"), tmp_path)
    artifact = trivium.compile(folder, "cpu", generator=False, out=tmp_path / "out")
    assert artifact.generator is None


def test_tokenizer_with_fewer_tokens_than_the_model_will_do(
    shared_data: Callable[[str], Path], tmp_path: Path
) -> None:
    def cut(document: dict[str, Any]) -> None:
        model = document["model"]
        model["vocab"] = {text: id for text, id in model["vocab"].items() if id < 700}
        model["merges"] = [
            pair for pair in model["merges"]
            if "".join(pair.split(" ") if isinstance(pair, str) else pair) in model["vocab"]
        ]  # fmt: skip

    folder = with_tokenizer(cut, shared_data("llm-shakespeare"), tmp_path)
    artifact = trivium.compile(folder, "cpu", out=tmp_path / "out")
    tokens = TextGenerator(artifact).encode("ROMEO:")
    assert tokens
    assert max(tokens) < 700


def test_tokenizer_put_into_an_artifact_is_refused_when_loaded(
    shakespeare: Artifact, shared_data: Callable[[str], Path], tmp_path: Path
) -> None:
    copy = tmp_path / "artifact"
    shutil.copytree(shakespeare.path, copy)
    folder = with_tokenizer(grown, shared_data("llm-shakespeare"), tmp_path)
    shutil.copyfile(folder / "tokenizer.json", copy / "tokenizer.json")
    with pytest.raises(BadInput, match="has the token 1024, and the model a vocabulary of 1024"):
        Tokenizer(Artifact.open(copy, checked=False))


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(["generate", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_verb_streams_text(shakespeare: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(
        capsys, str(shakespeare.path), "--prompt", "ROMEO:", "--max-new-tokens", "9"
    )
    assert code == 0
    (expected,) = TextGenerator(shakespeare).complete(["ROMEO:"], Settings(max_new_tokens=9))
    assert out == f"{expected.text}\n"
    assert "2 tokens in, 9 out (length)" in err


def test_verb_s_document(
    shakespeare: Artifact, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    batch = tmp_path / "prompts.jsonl"
    batch.write_text('{"prompt": "ROMEO:"}\n{"prompt": [5, 17]}\n')
    options = ("--batch", str(batch), "--max-new-tokens", "4", "--logprobs", "2", "--json")
    code, out, _ = run(capsys, str(shakespeare.path), *options)
    assert code == 0
    outputs: list[dict[str, Any]] = json.loads(out)["outputs"]
    assert [one["prompt_tokens"] for one in outputs] == [2, 2]
    for one in outputs:
        keys = {"text", "tokens", "finish_reason", "first_token_s", "tokens_per_s", "logprobs"}
        assert keys < set(one)
        assert len(one["tokens"]) == len(one["logprobs"]) == 4
        assert len(one["logprobs"][0]["top"]) == 2


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--prompt", ""), "the prompt: is empty"),
        (("--prompt", "a b " * 400), "which leaves no room in a context of 512"),
        (("--prompt-ids", "1,x"), "--prompt-ids: '1,x' is no list of tokens"),
        (("--prompt-ids", "4096"), "holds the token 4096, and the vocabulary is 1024"),
        (("--batch", "absent.txt"), "absent.txt: no such file"),
        (("--prompt", "x", "--top-p", "2"), "top_p is 2.0"),
    ],
)
def test_verb_refuses_in_one_line(
    shakespeare: Artifact,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    problem: str,
) -> None:
    code, out, err = run(capsys, str(shakespeare.path), *options)
    assert (code, out) == (2, "")
    assert problem in err
    assert err.count("\n") == 1


def test_what_is_no_generator_cannot_generate(
    shared_data: Callable[[str], Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = shared_data("models/mnist_cnn_cntk.onnx")
    artifact = trivium.compile(model, "cpu", out=tmp_path / "out")
    code, _, err = run(capsys, str(artifact.path), "--prompt", "x")
    assert code == 2
    assert "is no generator; compile a decoder with --generator" in err


def test_bench_times_prefill_and_decode(
    shakespeare: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    code = cli.main(["bench", str(shakespeare.path), "--seconds", "0.5", "--runs", "5", "--json"])
    document = json.loads(capsys.readouterr().out)
    assert code == 0
    assert document["tokens"] == 512
    assert document["decode_tokens_per_s"] == pytest.approx(1 / document["latency_s"])
    assert document["prefill_tokens_per_s"] > document["decode_tokens_per_s"]


def test_generating_imports_no_compiler(shakespeare: Artifact) -> None:
    """The first token waits for every module that is imported."""
    code = (
        "import sys, trivium\n"
        f"print(next(iter(trivium.generate({str(shakespeare.path)!r}, 'ROMEO:'))).tokens)\n"
        "heavy = ('onnx', 'onnx_ir', 'ml_dtypes', 'sympy', 'jax', 'jinja2', 'importlib.metadata')\n"
        "assert not [name for name in heavy if name in sys.modules]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
