"""The example server, asked what its schema allows and what it does not: an answer, or a status 4xx with the reason.

Never a status 5xx, never a hang, and when all is answered or given up every page of the cache is free.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import time
import warnings
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.fuzz import json_values
from tests.ranks import run_ranks
from tests.test_serve import Client, example, served, until

SECONDS = float(os.environ.get("SEQPAR_FUZZ_SECONDS", "0")) / 8
EXAMPLES = 10
PAGES = 8

LIMITS = (
    "must fit into the cache",
    "must give 1 to 64 choices",
    "must hold ids below",
    "must have at least one token",
    "must be whole characters",
)
"""What a body of the schema may be refused for: sizes of this model and its cache, and texts that have no tokens."""


def ask(client: Client, path: str, body: Any) -> tuple[int, str]:
    """The status, and the text of an answer, of its events, or of the reason."""
    connection, response = client.open(path, json.dumps(body).encode())
    content = response.read().decode()
    connection.close()
    if response.getheader("Content-Type", "").startswith("text/event-stream"):
        assert content.endswith("data: [DONE]\n\n"), content
        for event in content.split("\n\n")[:-2]:
            assert "error" not in json.loads(event.removeprefix("data: ")), event
    elif response.status != 200:
        content = json.loads(content)["error"]["message"]
        assert content
    else:
        json.loads(content)
    return response.status, content


def answers(client: Client, path: str, schema: Any, data: st.DataObject) -> None:
    """One body, of the schema or not."""
    if data.draw(st.booleans()):
        body = data.draw(json_values.values(schema))
        assert json_values.holds(schema, body)
        status, said = ask(client, path, body)
        refused = status == 400 and any(limit in said for limit in LIMITS)
        assert status == 200 or refused, (status, said, body)
    else:
        body = data.draw(json_values.broken(schema))
        status, said = ask(client, path, body)
        assert 400 <= status < 500, (status, said, body)


def breaks_off(client: Client, data: st.DataObject) -> None:
    """Bytes that are no call, or half of one, and a client that goes away."""
    body = b'{"prompt": "import os", "max_tokens": 40, "stream": true}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    whole = head + body
    sent = data.draw(
        st.sampled_from([whole, whole[:-7], head, head[:20], b"\x00\xff\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"])
        | st.binary(max_size=60)
    )
    with socket.create_connection(("127.0.0.1", client.port), timeout=30) as connection:
        connection.sendall(sent)
        if data.draw(st.booleans()):
            connection.settimeout(0.02)
            with suppress(TimeoutError, ConnectionError):
                connection.recv(1 << 12)


def other_calls(client: Client, data: st.DataObject) -> None:
    """Other methods, paths and kinds of content."""
    method = data.draw(st.sampled_from(["GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH"]))
    path = data.draw(
        st.sampled_from(["/", "/v1/completions", "/v1/models/%ff%00", "/openapi.json", "/v1/models", "//"])
    )
    content = data.draw(st.sampled_from([None, b"", b"null", b"NaN", b"{}", b'{"prompt": NaN}', b"\xff\xfe", b"a=b"]))
    connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=30)
    connection.request(method, path, content, {"Content-Type": data.draw(st.sampled_from(["text/plain", "", "x/y;z"]))})
    status = connection.getresponse().status
    connection.close()
    assert status < 500, (method, path, content, status)


def is_fuzzed(rank: int, p: int, seconds: float) -> int:
    """How many bodies were sent."""
    engine = example("engine")
    options = engine.parse(["--pages", str(PAGES), "--page-size", "4", "--tau", "16", "--max-requests", "8"])
    loop, _, _ = engine.start(options)
    count = 0
    with served(loop, options.model) as client:
        status, document = client.ask("/openapi.json")
        assert status == 200 and document["openapi"].startswith("3.1")
        schemas = {
            path: each["post"]["requestBody"]["content"]["application/json"]["schema"]
            for path, each in document["paths"].items()
        }
        assert set(schemas) == {"/v1/completions", "/v1/chat/completions"}

        @settings(
            max_examples=EXAMPLES,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(data=st.data())
        def examples(data: st.DataObject) -> None:
            nonlocal count
            count += 1
            for path, schema in schemas.items():
                answers(client, path, schema, data)
            breaks_off(client, data)
            other_calls(client, data)

        end, draw = time.monotonic() + seconds, 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that other threads use the module `random` while values are drawn
            while True:
                seed(draw)(examples)()
                draw = time.monotonic_ns()
                if time.monotonic() >= end:
                    break
        until(lambda: client.ask("/health")[1]["live"] == 0)
        assert ask(client, "/v1/completions", {"prompt": "import os", "max_tokens": 3})[0] == 200, "it still serves"
    assert loop.kv.free_pages == PAGES and not loop.kv.ids
    return count


def test_bodies_of_the_schema_and_others() -> None:
    pytest.importorskip("uvicorn")
    (count,) = run_ranks(1, is_fuzzed, SECONDS, timeout_s=120.0 + 2 * SECONDS)
    assert count >= EXAMPLES


def test_a_schema_is_read_as_it_is_meant() -> None:
    schema = {
        "type": "object",
        "required": ["a"],
        "properties": {"a": {"type": ["integer", "null"], "minimum": 1}, "b": {"enum": [1, [], "x"]}},
        "additionalProperties": False,
    }
    good: list[Any] = [{"a": 1}, {"a": None}, {"a": 2, "b": []}, {"a": 2, "b": "x"}]
    bad: list[Any] = [
        {},
        {"a": 0},
        {"a": True},
        {"a": 1.0},
        {"a": 1, "b": True},
        {"a": 1, "c": 1},
        {"a": 1, "b": None},
        5,
    ]
    assert all(json_values.holds(schema, each) for each in good)
    assert not any(json_values.holds(schema, each) for each in bad)
    number = {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
    assert [json_values.holds(number, each) for each in (0, 1e-9, 1, 1.5, float("nan"), True)] == [0, 1, 1, 0, 0, 0]
