"""Serving: the client that everybody uses, bad requests, clients that vanish, and load."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="starlette is not installed (pip install 'trivium[serve]')")
pytest.importorskip("uvicorn", reason="uvicorn is not installed (pip install 'trivium[serve]')")
pytest.importorskip("prometheus_client", reason="prometheus_client is not installed")
pytest.importorskip("openai", reason="openai is not installed")
pytest.importorskip("httpx", reason="httpx is not installed")
pytest.importorskip("tokenizers", reason="tokenizers is not installed")

import httpx
import openai

import trivium
from tests.generation.test_text import CHAT, with_template
from trivium.compiler import cli
from trivium.compiler.artifact import Artifact
from trivium.compiler.generation.sampling import Settings
from trivium.compiler.generation.text import TextGenerator
from trivium.compiler.serving.app import Limits, Server


@pytest.fixture(scope="module")
def artifact(
    shared_data: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Artifact:
    """The trained model, with a chat template."""
    folder = tmp_path_factory.mktemp("served")
    return with_template(CHAT, shared_data("llm-shakespeare"), folder)


@contextmanager
def serving(artifact: Artifact) -> Iterator[str]:
    """The address of a server in a process of its own."""
    command = [sys.executable, "-m", "trivium.compiler.cli", "serve", str(artifact.path)]
    options = ["--port", "0", "--name", "shakespeare", "--rows", "4"]
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.match(r"serving shakespeare at (http://127\.0\.0\.1:\d+)/v1", line)
        assert found, line
        try:
            yield found[1]
        finally:
            process.terminate()
            assert process.wait(30) in (0, 130)


@pytest.fixture(scope="module")
def address(artifact: Artifact) -> Iterator[str]:
    with serving(artifact) as found:
        yield found


@pytest.fixture(scope="module")
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def expected(artifact: Artifact) -> str:
    (one,) = TextGenerator(artifact).complete(["ROMEO:"], Settings(max_new_tokens=24))
    assert one.text is not None
    return one.text


def test_completion(client: openai.OpenAI, expected: str) -> None:
    answer = client.completions.create(
        model="shakespeare", prompt="ROMEO:", max_tokens=24, temperature=0, logprobs=2
    )
    choice = answer.choices[0]
    assert (choice.text, choice.finish_reason) == (expected, "length")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 24)
    assert choice.logprobs is not None
    assert len(choice.logprobs.token_logprobs or ()) == 24


def test_completion_streams(client: openai.OpenAI, expected: str) -> None:
    stream = client.completions.create(
        model="shakespeare",
        prompt="ROMEO:",
        max_tokens=24,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    events = list(stream)
    assert len(events) > 5
    assert "".join(event.choices[0].text for event in events if event.choices) == expected
    assert events[-1].usage is not None
    assert events[-1].usage.completion_tokens == 24


@pytest.mark.slow
def test_openvino_is_served_alike(
    expected: str, shared_data: Callable[[str], Path], tmp_path: Path
) -> None:
    pytest.importorskip("openvino", reason="openvino is not installed")
    folder = shared_data("llm-shakespeare")
    artifact = trivium.compile(folder, "cpu", backend="openvino", out=tmp_path / "out")
    with serving(artifact) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        asked: dict[str, Any] = {"model": "shakespeare", "max_tokens": 24, "temperature": 0}

        def ask(prompt: str) -> str:
            events = client.completions.create(prompt=prompt, stream=True, **asked)
            return "".join(event.choices[0].text for event in events if event.choices)

        with ThreadPoolExecutor(4) as pool:
            streamed = list(pool.map(ask, ["ROMEO:", "JULIET:"] * 3))
        together = client.completions.create(prompt=["ROMEO:", "JULIET:"], **asked)
        assert streamed[0] == expected
        assert streamed == [choice.text for choice in together.choices] * 3
        with client.completions.create(prompt="ROMEO:", stream=True, **asked) as stream:
            next(iter(stream))  # and hang up
        assert ask("ROMEO:") == expected


def test_several_prompts_and_choices(client: openai.OpenAI, expected: str) -> None:
    answer = client.completions.create(
        model="shakespeare", prompt=["ROMEO:", "JULIET:"], max_tokens=24, temperature=0
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].text == expected
    drawn = client.completions.create(
        model="shakespeare", prompt="ROMEO:", max_tokens=12, temperature=1, n=3, seed=4
    )
    assert len({choice.text for choice in drawn.choices}) == 3
    again = client.completions.create(
        model="shakespeare", prompt="ROMEO:", max_tokens=12, temperature=1, n=3, seed=4
    )
    assert [c.text for c in again.choices] == [c.text for c in drawn.choices]


def test_chat(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "shakespeare",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Speak."}]}],
        "max_completion_tokens": 16,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 2,
    }
    answer = client.chat.completions.create(**asked)
    choice = answer.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert len(choice.logprobs.content[0].top_logprobs) == 2
    events = list(client.chat.completions.create(**asked, stream=True))
    assert events[0].choices[0].delta.role == "assistant"
    text = "".join(event.choices[0].delta.content or "" for event in events)
    assert text == choice.message.content


def test_models_health_and_metrics(client: openai.OpenAI, address: str) -> None:
    assert [model.id for model in client.models.list()] == ["shakespeare"]
    client.completions.create(model="shakespeare", prompt="A", max_tokens=3)
    assert httpx.get(f"{address}/health").json()["status"] == "ok"
    text = httpx.get(f"{address}/metrics").text
    generated = re.search(r"^trivium_generated_tokens_total (\S+)", text, re.MULTILINE)
    assert generated
    assert float(generated[1]) >= 3
    assert 'trivium_requests_total{endpoint="/v1/completions",status="200"}' in text
    assert "trivium_first_token_seconds_bucket" in text


@pytest.mark.parametrize(
    ("endpoint", "body", "status", "problem"),
    [
        ("completions", "{", 400, "is not JSON"),
        ("completions", "[]", 400, "is no JSON object"),
        ("completions", {"prompt": 5}, 400, "prompt: is no text"),
        ("completions", {"prompt": ""}, 400, "the prompt: is empty"),
        ("completions", {"prompt": [5000]}, 400, "holds the token 5000"),
        ("completions", {"prompt": "a b " * 400}, 400, "no room in a context of 512"),
        ("completions", {"prompt": "a", "max_tokens": "many"}, 400, "give an integer"),
        ("completions", {"prompt": "a", "temperature": -1}, 400, "temperature is -1.0"),
        ("completions", {"prompt": "a", "n": 99}, 400, "asks for 99 texts"),
        ("completions", {"prompt": "a", "logit_bias": {"5": 1}}, 400, "is not offered here"),
        ("completions", {"prompt": "a", "model": "gpt"}, 404, "no such model 'gpt'"),
        ("chat/completions", {"messages": []}, 400, "is no list of messages"),
        ("chat/completions", {"messages": [{"role": "user"}]}, 400, "content that is no text"),
        ("chat/completions", {"messages": [{"role": "a", "content": "x"}], "tools": [1]}, 400,
         "tools: is not offered"),
    ],
)  # fmt: skip
def test_bad_requests_are_told_in_one_line(
    address: str, endpoint: str, body: Any, status: int, problem: str
) -> None:
    text = body if isinstance(body, str) else json.dumps(body)
    answer = httpx.post(f"{address}/v1/{endpoint}", content=text)
    assert answer.status_code == status
    assert problem in answer.json()["error"]["message"]
    assert "\n" not in answer.json()["error"]["message"]
    assert httpx.get(f"{address}/health").status_code == 200


def _gauge(address: str, name: str) -> float:
    text = httpx.get(f"{address}/metrics").text
    found = re.search(rf"^trivium_{name} (\S+)", text, re.MULTILINE)
    assert found
    return float(found[1])


@pytest.mark.parametrize("stream", [True, False])
def test_client_that_vanishes_is_cancelled(address: str, stream: bool) -> None:
    body = {"prompt": "ROMEO:", "max_tokens": 500, "temperature": 0, "stream": stream}
    before = _gauge(address, "generated_tokens_total")
    if stream:
        with httpx.stream("POST", f"{address}/v1/completions", json=body) as answer:
            next(answer.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{address}/v1/completions", json=body, timeout=0.15)
    ended = time.monotonic() + 20
    while _gauge(address, "active_requests") and time.monotonic() < ended:
        time.sleep(0.02)
    assert _gauge(address, "active_requests") == 0
    assert _gauge(address, "generated_tokens_total") - before < 450


def test_many_clients_at_once_get_what_each_gets_alone(client: openai.OpenAI, address: str) -> None:
    prompts = [f"{name}:\nI" for name in ("ROMEO", "JULIET", "DUKE", "KING", "A", "B")]

    def ask(prompt: str) -> str:
        answer = client.completions.create(
            model="shakespeare", prompt=prompt, max_tokens=20, temperature=0
        )
        return answer.choices[0].text

    alone = [ask(prompt) for prompt in prompts]
    steps, tokens = _gauge(address, "steps_total"), _gauge(address, "generated_tokens_total")
    with ThreadPoolExecutor(len(prompts)) as pool:
        assert list(pool.map(ask, prompts)) == alone
    steps, tokens = (
        _gauge(address, "steps_total") - steps,
        _gauge(address, "generated_tokens_total") - tokens,
    )
    # They share the calls of the model: fewer steps than tokens.
    assert tokens / steps > 1.5


async def _post(server: Server, body: dict[str, Any]) -> httpx.Response:
    transport = httpx.ASGITransport(server.application())
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        return await http.post("/v1/completions", json=body, timeout=60)


def test_deadline_and_full_queue_and_failing_engine(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = {"prompt": "ROMEO:", "max_tokens": 400, "temperature": 0}
    short = {"prompt": "ROMEO:", "max_tokens": 2, "temperature": 0}

    async def scenario() -> None:
        server = Server(TextGenerator(artifact, rows=1), "shakespeare", Limits(1, 0.2))
        server.loop.start()
        try:
            answers = await asyncio.gather(*(_post(server, long) for _ in range(4)))
            assert sorted(answer.status_code for answer in answers) == [429, 429, 504, 504]
            late = next(answer for answer in answers if answer.status_code == 504)
            assert "not done after 0.2 s" in late.json()["error"]["message"]
            full = next(answer for answer in answers if answer.status_code == 429)
            assert full.headers["retry-after"] == "1"

            def fail(*arguments: Any, **options: Any) -> None:
                raise RuntimeError("out of luck")

            while server.loop.pending:
                await asyncio.sleep(0.01)
            with monkeypatch.context() as patch:
                patch.setattr(server.generator.decoder, "feed", fail)
                answer = await _post(server, short)
                assert answer.status_code == 500
                assert "the engine failed (RuntimeError)" in answer.json()["error"]["message"]
            assert (await _post(server, short)).status_code == 200
        finally:
            server.loop.stop()

    asyncio.run(scenario())


def test_port_that_is_taken_is_one_line(
    address: str, artifact: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    port = address.rpartition(":")[2]
    assert cli.main(["serve", str(artifact.path), "--port", port]) == 2
    captured = capsys.readouterr()
    assert f"127.0.0.1:{port}: cannot listen there" in captured.err
