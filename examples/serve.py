"""An OpenAI-compatible server in front of the engine's loop: completions and chats, whole or streamed.

    python examples/serve.py --port 8000
    torchrun --nproc-per-node 2 examples/serve.py --sp 2 --shift 16 --policy stall-free --tau 64

    client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")      # or any other stock client
    client.completions.create(model="tiny-llama", prompt="def main(", max_tokens=32, stream=True)

HTTP is served by one thread and the loop is run by another; what is asked and what is given up goes to the loop between
two steps, what it generates comes back as text. Rank 0 serves, the others follow it. Options that are not about HTTP
are the engine's (`examples/engine.py --help`). What cannot be served is refused with a status 4xx and the reason, and
nobody else notices: a body that is none, an option that is out of range or not known here, a request that the cache
cannot hold. A client that goes away leaves the loop, and its pages are free.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import queue
import secrets
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any, NamedTuple

import engine
import uvicorn
from jinja2 import TemplateError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as Call
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from transformers import AutoTokenizer

from seqpar.batching import Generation, Request, Sampling, TemporalFusion

IDLE_S = 30.0  # after so long without a request the loop turns once, so that followers do not give rank 0 up
MOST_BODY = 16 << 20
MOST_CHOICES = 64
PLAIN_CHAT = "{% for each in messages %}{{ each.role }}: {{ each.content }}\n{% endfor %}assistant:"
FINISH = {"length": "length", "stop_token": "stop", "stop_string": "stop"}
IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
NEUTRAL: dict[str, tuple[Any, ...]] = {  # what is not done here may be said not to be wanted
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0, 0.0),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "presence_penalty": (0, 0.0),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
}


def schema_of(name: str) -> dict[str, Any]:
    """What bodies say, as an OpenAPI document; null is as good as nothing."""

    def maybe(kind: str, **bounds: Any) -> dict[str, Any]:
        return {"type": [kind, "null"], **bounds}

    text, some = {"type": "string"}, {"type": "string", "minLength": 1}
    ids = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
    prompts = {"type": "array", "minItems": 1, "maxItems": MOST_CHOICES, "items": {"anyOf": [some, ids]}}
    part = {"type": "object", "required": ["type", "text"], "properties": {"type": {"enum": ["text"]}, "text": text}}
    said = {"role": text, "content": {"anyOf": [text, {"type": "array", "items": part}]}}
    message = {"type": "object", "required": ["role", "content"], "properties": said}
    count = maybe("integer", minimum=1)
    options: dict[str, Any] = {
        "model": {"enum": [name, None]},
        "max_tokens": count,
        "n": maybe("integer", minimum=1, maximum=MOST_CHOICES),
        "temperature": maybe("number", minimum=0),
        "top_p": maybe("number", exclusiveMinimum=0, maximum=1),
        "top_k": count,
        "seed": maybe("integer"),
        "stop": {"anyOf": [maybe("string"), {"type": "array", "items": some}]},
        "stream": maybe("boolean"),
        "stream_options": maybe("object", properties={"include_usage": {"type": "boolean"}}),
        **{each: {} for each in IGNORED},
        **{each: {"enum": [*values, None]} for each, values in NEUTRAL.items()},
    }
    chat = {"messages": {"type": "array", "minItems": 1, "items": message}, "max_completion_tokens": count}
    own = {"completions": {"prompt": {"anyOf": [some, ids, prompts]}}, "chat/completions": chat}
    paths = {}
    for path, first in own.items():
        properties, required = {**first, **options}, [next(iter(first))]
        body = {"type": "object", "required": required, "properties": properties, "additionalProperties": False}
        answers = {"200": {"description": "the answer, or its events"}, "4XX": {"description": "refused, with why"}}
        content = {"required": True, "content": {"application/json": {"schema": body}}}
        paths[f"/v1/{path}"] = {"post": {"requestBody": content, "responses": answers}}
    return {"openapi": "3.1.0", "info": {"title": "seqpar's example server", "version": "1"}, "paths": paths}


class RefusedError(Exception):
    """What a client asked for cannot be done; `param` names the part of the body."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.status, self.code = param, status, code

    @property
    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


# The loop's side.


class Piece(NamedTuple):
    """Text of one choice of an answer, why it ends, and how many tokens it has so far."""

    choice: int
    text: str
    finish: str | None
    tokens: int


class Answer:
    """What the loop's thread tells the one that serves: None for accepted, then pieces, or why there are none."""

    def __init__(self) -> None:
        self._events: asyncio.Queue[Piece | RefusedError | None] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def tell(self, event: Piece | RefusedError | None) -> None:
        with suppress(RuntimeError):  # nobody serves any more
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def next(self) -> Piece | None:
        event = await self._events.get()
        if isinstance(event, RefusedError):
            raise event
        return event


class _Live:
    """A choice that is being generated, and how much of its text has been told."""

    def __init__(self, answer: Answer, choice: int, generation: Generation) -> None:
        self.answer, self.choice, self.generation = answer, choice, generation
        self.told = 0

    def tell(self, finish: str | None) -> None:
        """Send what is decided of the text and has not been sent."""
        text, tokens = self.generation.text, len(self.generation.tokens)
        if len(text) > self.told or finish:
            self.answer.tell(Piece(self.choice, text[self.told :], FINISH[finish] if finish else None, tokens))
            self.told = len(text)


class Worker(threading.Thread):
    """The thread that runs the loop; others talk to it by `ask` and `drop`.

    Args:
        loop: it belongs to this thread from its start on.
        ended: called when there will be no more answers.
    """

    def __init__(self, loop: TemporalFusion, ended: Callable[[], None] = lambda: None) -> None:
        super().__init__(name="loop")
        self.loop, self.failure = loop, ""
        self._ended = ended
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._live: dict[Any, _Live] = {}
        self._is_open, self._lock = True, threading.Lock()

    def ask(self, requests: list[Request]) -> Answer:
        """Let requests join, as the choices of one answer: all of them or none."""
        answer = Answer()
        with self._lock:
            if not self._is_open:
                raise self._closed()
            self._inbox.put(lambda: self._add(requests, answer))
        return answer

    def drop(self, answer: Answer) -> None:
        """Let those leave that are left of an answer."""
        self._inbox.put(lambda: self._drop(answer))

    def stop(self) -> None:
        self._inbox.put(None)

    def run(self) -> None:
        try:
            with self.loop:
                while self._attend():
                    for each in self.loop.step():
                        if each.id in self._live:
                            self._live[each.id].tell(each.finish)
                            if each.finish:
                                del self._live[each.id]
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}"
        with self._lock:
            self._is_open = False
        with suppress(queue.Empty):
            while True:  # those whose question nobody took are refused, too
                if (last := self._inbox.get_nowait()) is not None:
                    last()
        for live in self._live.values():
            live.answer.tell(self._closed())
        self._ended()

    def _closed(self) -> RefusedError:
        return RefusedError(self.failure or "the server is closing", status=503)

    def _attend(self) -> bool:
        """Do what was asked between two steps; waits while nothing is live. False at the end."""
        wait = not self.loop.live
        while True:
            try:
                asked = self._inbox.get(block=wait, timeout=IDLE_S)
            except queue.Empty:
                return True
            if asked is None:
                return False
            asked()
            wait = False

    def _add(self, requests: list[Request], answer: Answer) -> None:
        if not self._is_open:
            answer.tell(self._closed())
            return
        added: dict[Any, _Live] = {}
        try:
            for choice, request in enumerate(requests):
                added[request.id] = _Live(answer, choice, self.loop.add(request))
        except (ValueError, TypeError) as error:
            for name in added:
                self.loop.cancel(name)
            answer.tell(RefusedError(str(error)))
            return
        self._live |= added
        answer.tell(None)

    def _drop(self, answer: Answer) -> None:
        for name in [name for name, live in self._live.items() if live.answer is answer]:
            del self._live[name]
            if self._is_open:
                self.loop.cancel(name)


# What a body says.


class Job(NamedTuple):
    """What a client asked for."""

    prompts: list[list[int]]
    max_tokens: int | None
    sampling: dict[str, Any]
    stop: list[str]
    n: int
    stream: bool
    usage: bool
    chat: bool

    def requests(self, name: str, stop_token: int | None, room: int) -> list[Request]:
        """One for each choice; ValueError or TypeError where there cannot be one."""
        made = []
        ends: dict[str, Any] = {"stop_tokens": set() if stop_token is None else {stop_token}, "stop_strings": self.stop}
        seed = self.sampling.get("seed", secrets.randbits(63))
        for number in range(len(self.prompts) * self.n):
            prompt = self.prompts[number // self.n]
            new = min(256, max(1, room - len(prompt) + 1)) if self.max_tokens is None else self.max_tokens
            sampling = Sampling(**(self.sampling | {"seed": (seed + number % self.n) % 2**64}))
            made.append(Request((name, number), prompt, new, sampling, **ends))
        return made


class Body:
    """The options of a JSON object, taken one after another; what is left at the end is not known here."""

    def __init__(self, content: bytes) -> None:
        try:
            self.left = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise RefusedError(f"the body must be JSON, got {error}") from None
        if not isinstance(self.left, dict):
            raise RefusedError(f"the body must be an object, got {type(self.left).__name__}")

    def take(self, name: str, kind: type, default: Any = None) -> Any:
        """An option of some type; an integer is a float, a truth value is no number."""
        value = self.left.pop(name, None)
        if value is None:
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 64:
            return float(value)
        if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
            raise RefusedError(f"`{name}` must be of type {kind.__name__}, got {str(value)[:100]!r}", name)
        return value

    def take_text(self, value: Any, name: str) -> str:
        """A text that has bytes: JSON can say halves of characters."""
        if not isinstance(value, str):
            raise RefusedError(f"`{name}` must hold texts, got {str(value)[:100]!r}", name)
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise RefusedError(f"`{name}` must be whole characters, got {error}", name) from None
        return value

    def end(self) -> None:
        """Refuse what was not taken, but for what says that nothing is wanted."""
        for name in IGNORED:
            self.left.pop(name, None)
        for name, value in self.left.items():
            if name not in NEUTRAL:
                raise RefusedError(f"`{name}` must be left out, got an option that is not known here", name)
            if value is not None and not any(value == known and type(value) is type(known) for known in NEUTRAL[name]):
                raise RefusedError(f"`{name}` must be left out, as this server does not do it, got {value!r}", name)


def parse_completion(body: Body, tokenizer: Any) -> Job:
    """The body of a completion: prompts are texts or token ids, one or several."""
    prompt = body.left.pop("prompt", None)
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and not isinstance(prompt[0], (str, list))):
        prompt = [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise RefusedError("`prompt` must be a text, token ids, or a list of them, got none", "prompt")
    prompts = []
    for each in prompt:
        if isinstance(each, list):
            if any(isinstance(token, bool) or not isinstance(token, int) for token in each):
                raise RefusedError("`prompt` must hold integers or texts, got something else", "prompt")
            prompts.append(each)
        else:
            prompts.append(tokenizer(body.take_text(each, "prompt")).input_ids)
    return _job(body, prompts, body.take("max_tokens", int, 16), chat=False)


def parse_chat(body: Body, tokenizer: Any) -> Job:
    """The body of a chat, written as one prompt by the model's template."""
    messages = []
    for each in body.take("messages", list, []):
        if not isinstance(each, dict) or not isinstance(each.get("role"), str):
            raise RefusedError("`messages` must hold objects with a `role` and a `content`, got others", "messages")
        parts = each.get("content")
        if isinstance(parts, list):
            if not all(isinstance(part, dict) and part.get("type") == "text" for part in parts):
                raise RefusedError("`messages` must hold texts, got content of another type", "messages")
            parts = "".join(body.take_text(part.get("text"), "messages") for part in parts)
        role = body.take_text(each["role"], "messages")
        messages.append({"role": role, "content": body.take_text(parts, "messages")})
    if not messages:
        raise RefusedError("`messages` must hold at least one message, got none", "messages")
    options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True}
    try:
        text = tokenizer.apply_chat_template(messages, chat_template=tokenizer.chat_template or PLAIN_CHAT, **options)
    except TemplateError as error:
        raise RefusedError(f"`messages` must be what the model's template takes, got {error}", "messages") from None
    new = body.take("max_tokens", int)
    prompts = [tokenizer(text, add_special_tokens=False).input_ids]
    return _job(body, prompts, body.take("max_completion_tokens", int, new), chat=True)


def _job(body: Body, prompts: list[list[int]], max_tokens: int | None, *, chat: bool) -> Job:
    if max_tokens is not None and max_tokens < 1:
        raise RefusedError(f"`max_tokens` must be at least 1, got {max_tokens}", "max_tokens")
    n, stop = body.take("n", int, 1), body.left.pop("stop", None)
    stop = [] if stop is None or stop == "" else stop if isinstance(stop, list) else [stop]
    stop = [body.take_text(each, "stop") for each in stop]
    if n < 1 or n * len(prompts) > MOST_CHOICES:
        raise RefusedError(f"`n` must give 1 to {MOST_CHOICES} choices, got {n} for {len(prompts)} prompt(s)", "n")
    sampling = {"temperature": body.take("temperature", float, 1.0), "top_p": body.take("top_p", float, 1.0)}
    sampling |= {name: value for name in ("seed", "top_k") if (value := body.take(name, int)) is not None}
    stream, usage = body.take("stream", bool, False), body.take("stream_options", dict, {}).get("include_usage", False)
    if not isinstance(usage, bool):
        raise RefusedError(f"`include_usage` must be of type bool, got {str(usage)[:100]!r}", "stream_options")
    body.end()
    return Job(prompts, max_tokens, sampling, stop, n, stream, usage, chat)


# The server.


class Server:
    """Routes over a worker.

    Args:
        worker: who runs the loop.
        tokenizer: of this thread alone.
        name: what the model is called.
    """

    def __init__(self, worker: Worker, tokenizer: Any, name: str) -> None:
        self.worker, self.tokenizer, self.name = worker, tokenizer, name
        self.started = int(time.time())

    def application(self) -> Starlette:
        routes = [
            Route("/health", self.health),
            Route("/openapi.json", self.schema),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chats, methods=["POST"]),
        ]
        handlers: dict[Any, Any] = {RefusedError: _refuse, HTTPException: _not_found}
        return Starlette(routes=routes, exception_handlers=handlers, max_body_size=MOST_BODY)

    async def health(self, call: Call) -> Response:
        return JSONResponse({"status": "ok", "live": len(self.worker.loop.live)})

    async def schema(self, call: Call) -> Response:
        return JSONResponse(schema_of(self.name))

    async def models(self, call: Call) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, call: Call) -> Response:
        self._check_name(call.path_params["name"])
        return JSONResponse(self._card())

    async def completions(self, call: Call) -> Response:
        return await self._answer(call, parse_completion)

    async def chats(self, call: Call) -> Response:
        return await self._answer(call, parse_chat)

    async def _answer(self, call: Call, parse: Callable[[Body, Any], Job]) -> Response:
        body = Body(await call.body())
        name = f"{'chatcmpl' if parse is parse_chat else 'cmpl'}-{secrets.token_hex(12)}"
        self._check_name(body.take("model", str, self.name))
        job = parse(body, self.tokenizer)
        try:
            kv = self.worker.loop.kv
            requests = job.requests(name, self.tokenizer.eos_token_id, kv.num_pages * kv.page_size)
        except (ValueError, TypeError) as error:
            raise RefusedError(str(error)) from None
        answer = self.worker.ask(requests)
        gone = asyncio.create_task(self._watch(call, answer))
        words = Words(job, {"id": name, "created": int(time.time()), "model": self.name})
        try:
            await answer.next()  # it is accepted, or refused
            if job.stream:
                return StreamingResponse(self._stream(answer, gone, words), media_type="text/event-stream")
            while not words.is_complete:
                words.add(await answer.next())
            gone.cancel()
            return JSONResponse(words.whole())
        except BaseException:
            self._leave(answer, gone)
            raise

    async def _stream(self, answer: Answer, gone: asyncio.Task[None], words: Words) -> AsyncIterator[str]:
        try:
            for chunk in words.first():
                yield _event(chunk)
            while not words.is_complete:
                for chunk in words.add(await answer.next()):
                    yield _event(chunk)
            for chunk in words.last():
                yield _event(chunk)
            yield "data: [DONE]\n\n"
        except RefusedError as error:  # the status has been sent
            yield _event(error.body)
        finally:
            self._leave(answer, gone)

    async def _watch(self, call: Call, answer: Answer) -> None:
        """Give an answer up when nobody waits for it any more."""
        while (await call.receive())["type"] != "http.disconnect":
            pass
        self.worker.drop(answer)
        answer.tell(RefusedError("the client has gone away", status=499))

    def _leave(self, answer: Answer, gone: asyncio.Task[None]) -> None:
        gone.cancel()
        self.worker.drop(answer)

    def _card(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self.started, "owned_by": "seqpar"}

    def _check_name(self, name: str) -> None:
        if name != self.name:
            raise RefusedError(f"`model` must be {self.name!r}, got {name!r}", "model", 404, "model_not_found")


class Words:
    """An answer in the making, as OpenAI's clients read it."""

    def __init__(self, job: Job, head: dict[str, Any]) -> None:
        kind = "chat.completion" if job.chat else "text_completion"
        self._job, self._head, self._kind = job, head, kind
        choices = len(job.prompts) * job.n
        self._texts, self._finish = [""] * choices, [""] * choices
        self._tokens = [0] * choices

    @property
    def is_complete(self) -> bool:
        return all(self._finish)

    def first(self) -> list[dict[str, Any]]:
        """Chunks before any text."""
        if not self._job.chat:
            return []
        delta = {"delta": {"role": "assistant", "content": ""}}
        return [self._chunk(choice, delta, None) for choice in range(len(self._texts))]

    def add(self, piece: Piece | None) -> list[dict[str, Any]]:
        """Take what has been generated; chunks that say so."""
        assert piece is not None
        self._texts[piece.choice] += piece.text
        self._tokens[piece.choice] = piece.tokens
        self._finish[piece.choice] = piece.finish or ""
        if not self._job.chat:
            return [self._chunk(piece.choice, {"text": piece.text}, piece.finish)]
        chunks = [self._chunk(piece.choice, {"delta": {"content": piece.text}}, None)] if piece.text else []
        return [*chunks, self._chunk(piece.choice, {"delta": {}}, piece.finish)] if piece.finish else chunks

    def last(self) -> list[dict[str, Any]]:
        """Chunks after all text."""
        return [{**self._chunks_head(), "choices": [], "usage": self._usage()}] if self._job.usage else []

    def whole(self) -> dict[str, Any]:
        choices = []
        for index, (text, finish) in enumerate(zip(self._texts, self._finish, strict=True)):
            said = {"message": {"role": "assistant", "content": text}} if self._job.chat else {"text": text}
            choices.append({"index": index, **said, "logprobs": None, "finish_reason": finish})
        return {**self._head, "object": self._kind, "choices": choices, "usage": self._usage()}

    def _chunk(self, choice: int, said: dict[str, Any], finish: str | None) -> dict[str, Any]:
        usage = {"usage": None} if self._job.usage else {}
        choices = [{"index": choice, **said, "logprobs": None, "finish_reason": finish}]
        return {**self._chunks_head(), "choices": choices, **usage}

    def _chunks_head(self) -> dict[str, Any]:
        return {**self._head, "object": f"{self._kind}.chunk" if self._job.chat else self._kind}

    def _usage(self) -> dict[str, int]:
        prompt, new = sum(map(len, self._job.prompts)), sum(self._tokens)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


async def _refuse(call: Call, error: RefusedError) -> Response:
    return _refusal(error)


async def _not_found(call: Call, error: HTTPException) -> Response:
    found = RefusedError(f"{call.method} {call.url.path}: {error.detail}", status=error.status_code)
    return _refusal(found, headers=error.headers)


def _refusal(error: RefusedError, **options: Any) -> Response:
    """In ASCII: what a client said may have halves of characters, which have no bytes."""
    return Response(json.dumps(error.body), error.status, media_type="application/json", **options)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.allow_abbrev = False
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--name", help="of the model (default: that of its folder)")
    own, rest = parser.parse_known_args(arguments)
    options = engine.parse(rest)
    loop, _, group = engine.start(options)
    if group.rank():
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)  # they leave when rank 0 does
        loop.follow()
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn raises it again once it has closed
    worker = Worker(loop, lambda: setattr(server, "should_exit", True))
    tokenizer = AutoTokenizer.from_pretrained(options.model)  # one for each thread: they are not safe to share
    application = Server(worker, tokenizer, own.name or options.model.resolve().name).application()
    server = uvicorn.Server(uvicorn.Config(application, own.host, own.port, timeout_graceful_shutdown=5))
    worker.start()
    try:
        server.run()
    except (KeyboardInterrupt, SystemExit):
        pass
    finally:
        worker.stop()
        worker.join()
    if worker.failure:
        print(worker.failure, file=sys.stderr)
    return 1 if worker.failure else 0


if __name__ == "__main__":
    sys.exit(main())
