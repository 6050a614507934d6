"""The server, asked as stock clients ask it: over a socket, in the protocol's own words."""

from __future__ import annotations

import asyncio
import http.client
import importlib.util
import json
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks

pytest.importorskip("uvicorn")

EXAMPLES = Path(__file__).parent.parent / "examples"
PROMPT = "import os\n"
TOO_LONG = "`prompt` and `max_new_tokens` must fit into the cache"


def example(name: str) -> Any:
    """A script, as a module of its name."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


class Client:
    """What a stock client sends and understands."""

    def __init__(self, port: int) -> None:
        self.port = port

    def open(self, path: str, body: Any) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        method = "GET" if body is None else "POST"
        connection.request(method, path, None if body is None else content, {"Content-Type": "application/json"})
        return connection, connection.getresponse()

    def ask(self, path: str, body: Any = None) -> tuple[int, Any]:
        connection, response = self.open(path, body)
        status, content = response.status, response.read()
        connection.close()
        return status, json.loads(content)

    def stream(self, path: str, **body: Any) -> list[dict[str, Any]]:
        """The events before the last, as they were sent."""
        connection, response = self.open(path, {**body, "stream": True})
        assert response.status == 200 and response.getheader("Content-Type", "").startswith("text/event-stream")
        lines = response.read().decode().split("\n\n")
        connection.close()
        assert lines[-2:] == ["data: [DONE]", ""]
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


@contextmanager
def served(loop: Any, model: Path) -> Iterator[Client]:
    """The server on a free port, and what talks to it."""
    import uvicorn
    from transformers import AutoTokenizer

    serve = example("serve")
    worker = serve.Worker(loop)
    application = serve.Server(worker, AutoTokenizer.from_pretrained(model), "tiny").application()
    server = uvicorn.Server(uvicorn.Config(application, lifespan="off", ws="none", log_config=None))
    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listening],))
    worker.start()
    thread.start()
    try:
        yield Client(listening.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join()
        worker.stop()
        worker.join()
        listening.close()
    assert not worker.failure


def is_served(rank: int, p: int) -> tuple[str, bool]:
    """A server over p ranks, of which rank 0 asks itself; what it answered, and whether all pages are free."""
    engine = example("engine")
    options = engine.parse(["--sp", str(p), "--shift", "8", "--pages", "12", "--tau", "16"])
    loop, _, group = engine.start(options)
    if group.rank():
        loop.follow()
        return "", loop.kv.free_pages == 12
    with served(loop, options.model) as client:
        text = asks(client)
        refuses(client)
        leaves(client, loop)
    return text, loop.kv.free_pages == 12


def asks(client: Client) -> str:
    """Whole and streamed, texts and chats, with stop strings and seeds; the text of a greedy completion."""
    status, models = client.ask("/v1/models")
    assert status == 200 and [each["id"] for each in models["data"]] == ["tiny"]
    assert client.ask("/v1/models/tiny")[1]["object"] == "model"

    greedy = {"model": "tiny", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    status, whole = client.ask("/v1/completions", greedy)
    assert status == 200 and whole["object"] == "text_completion"
    (choice,) = whole["choices"]
    usage = whole["usage"]
    assert choice["finish_reason"] == "length" and usage["completion_tokens"] == 12
    assert usage["total_tokens"] == usage["prompt_tokens"] + 12

    chunks = client.stream("/v1/completions", **greedy, stream_options={"include_usage": True})
    assert chunks[-1]["usage"] == usage and chunks[-1]["choices"] == [] and chunks[0]["usage"] is None
    assert "".join(each["choices"][0]["text"] for each in chunks[:-1]) == choice["text"] and len(chunks) > 3
    assert [each["choices"][0]["finish_reason"] for each in chunks[-3:-1]] == [None, "length"]
    assert len({each["id"] for each in chunks}) == 1

    middle = choice["text"][4:6]
    cut = client.ask("/v1/completions", {**greedy, "stop": [middle, "never"]})[1]["choices"][0]
    assert cut == {**choice, "text": choice["text"].split(middle)[0], "finish_reason": "stop"}

    drawn = {"prompt": [PROMPT, [5, 6, 7]], "max_tokens": 3, "n": 2, "seed": 3, "top_p": 0.9}
    first, second = client.ask("/v1/completions", drawn)[1], client.ask("/v1/completions", drawn)[1]
    assert first["choices"] == second["choices"] and [each["index"] for each in first["choices"]] == [0, 1, 2, 3]
    other = client.ask("/v1/completions", {**drawn, "seed": 4})[1]["choices"]
    assert [each["text"] for each in other[:1]] == [each["text"] for each in first["choices"][1:2]], "n counts seeds on"

    parts = [{"type": "text", "text": "import "}, {"type": "text", "text": "os"}]
    chat = {"messages": [{"role": "user", "content": parts}], "max_completion_tokens": 5, "seed": 1, "user": "me"}
    status, whole = client.ask("/v1/chat/completions", chat)
    assert status == 200 and whole["object"] == "chat.completion"
    message = whole["choices"][0]["message"]
    deltas = [each["choices"][0]["delta"] for each in client.stream("/v1/chat/completions", **chat)]
    assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
    assert "".join(each.get("content", "") for each in deltas) == message["content"]
    text: str = choice["text"]
    return text


BAD: list[tuple[str, Any, int, str]] = [
    ("completions", b"{", 400, "the body must be JSON"),
    ("completions", b"\xff", 400, "the body must be JSON"),
    ("completions", b"[" * 100_000, 400, "the body must be JSON"),
    ("completions", [], 400, "the body must be an object, got list"),
    ("completions", {}, 400, "`prompt` must be a text, token ids, or a list of them"),
    ("completions", {"prompt": [[]]}, 400, "`prompt` must have at least one token"),
    ("completions", {"prompt": [5, True]}, 400, "`prompt` must hold integers or texts"),
    ("completions", {"prompt": [5, 10**9]}, 400, "`prompt` must hold ids below"),
    ("completions", {"prompt": [[5, 6], [5, 10**9]], "max_tokens": 150}, 400, "`prompt` must hold ids below"),
    ("completions", {"prompt": "\ud800"}, 400, "`prompt` must be whole characters"),
    ("completions", {"prompt": PROMPT, "model": "other"}, 404, "`model` must be 'tiny', got 'other'"),
    ("completions", {"prompt": PROMPT, "max_tokens": 0}, 400, "`max_tokens` must be at least 1, got 0"),
    ("completions", {"prompt": PROMPT, "max_tokens": "5"}, 400, "`max_tokens` must be of type int, got '5'"),
    ("completions", {"prompt": PROMPT, "max_tokens": 10**30}, 400, TOO_LONG),
    ("completions", {"prompt": PROMPT, "temperature": -1}, 400, "`temperature` must be finite and >= 0"),
    ("completions", {"prompt": PROMPT, "temperature": 10**400}, 400, "`temperature` must be of type float"),
    ("completions", {"prompt": PROMPT, "top_p": 2}, 400, "`top_p` must be in (0, 1], got 2.0"),
    ("completions", {"prompt": PROMPT, "stop": 5}, 400, "`stop` must hold texts, got '5'"),
    ("completions", {"prompt": PROMPT, "stop": [""]}, 400, "`stop_strings` must not be empty texts"),
    ("completions", {"prompt": PROMPT, "n": 100}, 400, "`n` must give 1 to 64 choices, got 100"),
    ("completions", {"prompt": PROMPT, "logprobs": 0}, 400, "`logprobs` must be left out"),
    ("completions", {"prompt": PROMPT, "colour": 5}, 400, "`colour` must be left out, got an option that is not known"),
    ("chat/completions", {"messages": []}, 400, "`messages` must hold at least one message"),
    ("chat/completions", {"messages": [5]}, 400, "`messages` must hold objects with a `role`"),
    ("chat/completions", {"messages": [{"role": "user"}]}, 400, "`messages` must hold texts, got 'None'"),
    ("nothing", {}, 404, "POST /v1/nothing: Not Found"),
]


def refuses(client: Client) -> None:
    """Each bad body gets its reason, while a request that came before goes on."""
    connection, response = client.open("/v1/completions", {"prompt": PROMPT, "max_tokens": 60, "stream": True})
    for path, body, status, message in BAD:
        got, content = client.ask(f"/v1/{path}", body)
        assert got == status and content["error"]["message"].startswith(message), (body, got, content)
    assert response.read().decode().endswith("data: [DONE]\n\n")
    connection.close()
    assert client.ask("/health")[1]["live"] == 0, "of two prompts neither is left where one is refused"


def leaves(client: Client, loop: Any) -> None:
    """Clients that go away free their pages, whether they were told anything or not."""
    for stream in (True, False):
        body = {"prompt": PROMPT, "max_tokens": 150, "stream": stream}
        connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=60)
        connection.request("POST", "/v1/completions", json.dumps(body))
        if stream:
            assert connection.getresponse().readline().startswith(b"data: ")
        until(lambda: client.ask("/health")[1]["live"] == 1)
        steps = loop.steps
        connection.close()
        until(lambda: client.ask("/health")[1]["live"] == 0)
        assert loop.steps - steps < 100, "long before its end"


def until(holds: Any, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it does not come true"
        time.sleep(0.005)


def test_a_server_answers_stock_clients_on_two_ranks() -> None:
    text, expected = run_ranks(2, is_served, timeout_s=180.0), run_ranks(1, alone)[0]
    assert text == [(expected, True), ("", True)]


def alone(rank: int, p: int) -> str:
    """The greedy text of Transformers' own loop."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(EXAMPLES / "tiny-llama", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLES / "tiny-llama")
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    tokens = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    text: str = tokenizer.decode(tokens)
    return text


class BrokenLoop:
    """A loop whose model fails."""

    live = ("a",)

    def __enter__(self) -> BrokenLoop:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def step(self) -> tuple[()]:
        raise RuntimeError("the model failed")


def fails(rank: int, p: int) -> str:
    """Why a worker ended by itself; who asks it afterwards is told so."""
    example("engine")
    serve = example("serve")
    ended = threading.Event()
    worker = serve.Worker(BrokenLoop(), ended.set)
    worker.start()
    assert ended.wait(10)
    worker.join()

    async def asks_too_late() -> None:
        with pytest.raises(serve.RefusedError, match="the model failed") as refused:
            worker.ask([])
        assert refused.value.status == 503 and refused.value.body["error"]["type"] == "server_error"

    asyncio.run(asks_too_late())
    failure: str = worker.failure
    return failure


def test_a_loop_that_fails_ends_the_server_with_the_reason() -> None:
    assert run_ranks(1, fails) == ["RuntimeError: the model failed"]
