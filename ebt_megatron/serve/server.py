"""A text model over HTTP, as OpenAI's completions, and a page to watch it think."""

from __future__ import annotations

import asyncio
import json
import math
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse

from ebt_megatron.api.text import TextModel
from ebt_megatron.core.errors import DataError, RecipeError
from ebt_megatron.inference.options import ThinkingOptions
from ebt_megatron.inference.pool import Growing, Pool
from ebt_megatron.inference.sampling import Sampling
from ebt_megatron.serve.worker import Worker

PAGE = Path(__file__).with_name("page.html")
_IGNORED = {"model", "user", "stream_options", "store", "metadata"}
_NEUTRAL: dict[str, Any] = {
    "best_of": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "echo": False,
    "suffix": None,
    "logit_bias": {},
}
GRACE = 2.0  # seconds that requests under way have when the server is stopped
_UNSEEDED = secrets.randbits(31)  # the seed of requests without one: they differ by number, and share passes
_LOOK = 0.5  # seconds between looks whether a client is still there
_THINKING = {f.name for f in fields(ThinkingOptions)} - {"final_energy"}


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, and all of them together.

    Attributes:
        rows: texts that grow at a time.
        waiting: texts that wait for a row; more are refused with 503.
        length: tokens of a text, its prompt included.
        steps, candidates: of thinking, of a token.
        body: bytes of a request.
        seconds: until a request is given up with 504.
    """

    rows: int = 16
    waiting: int = 256
    length: int = 2048
    steps: int = 256
    candidates: int = 16
    body: int = 1 << 20
    seconds: float = 120.0


class Refused(Exception):
    """An answer that is an error: its status and its one line."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


@dataclass
class Asked:
    """A request of completions, read and checked."""

    texts: list[Growing]
    stream: bool
    logprobs: int
    energies: bool
    prompt_tokens: int


def _number(body: dict[str, Any], name: str, default: Any, kind: type, low: float, high: float) -> Any:
    value = body.get(name)
    if value is None:
        return default
    fits = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    if not fits or (kind is int and value != int(value)):
        raise Refused(
            400, f"{name}={value!r}: must be a {'whole ' if kind is int else ''}number from {low:g} to {high:g}"
        )
    return kind(value)


def read_request(body: Any, model: TextModel, limits: Limits) -> Asked:
    """A request's JSON as texts to grow; raises Refused, RecipeError or DataError for what does not do."""
    if not isinstance(body, dict):
        raise Refused(400, "the body must be a JSON object with a prompt")
    known = _IGNORED | _NEUTRAL.keys() | _THINKING
    known |= {
        "prompt",
        "max_tokens",
        "temperature",
        "top_p",
        "top_k",
        "n",
        "stop",
        "seed",
        "stream",
        "logprobs",
        "energies",
    }
    if unknown := [name for name in body if name not in known]:
        raise Refused(400, f"{unknown[0]}: no such field; there are {', '.join(sorted(known))}")
    for name, neutral in _NEUTRAL.items():
        if body.get(name) not in (None, neutral):
            raise Refused(400, f"{name}={body[name]!r}: is not supported; leave it out")
    prompt = body.get("prompt")
    several = prompt if isinstance(prompt, list) and all(isinstance(p, str) for p in prompt) else [prompt]
    if not several or not all(isinstance(p, str) for p in several):
        raise Refused(400, "prompt: must be a text, or a list of texts")
    count = _number(body, "n", 1, int, 1, limits.rows)
    most = _number(body, "max_tokens", 16, int, 1, limits.length)
    stop = body.get("stop") or []
    stops = (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, list) else (None,)
    if not all(isinstance(s, str) and s for s in stops) or len(stops) > 16:
        raise Refused(400, "stop: must be a text, or up to 16 of them, none empty")
    if len(several) * count > limits.waiting:
        raise Refused(400, f"{len(several)} prompts and n={count} are more than {limits.waiting} texts: ask for fewer")
    sampling = Sampling(
        _number(body, "temperature", 1.0, float, 0, 100),
        _number(body, "top_k", None, int, 1, 1 << 30),
        _number(body, "top_p", 1.0, float, 0, 1),
        _number(body, "seed", _UNSEEDED, int, 0, (1 << 62) - 1),
    )
    logprobs = _number(body, "logprobs", -1, int, 0, 20)
    for option, most_of_it in (("steps", limits.steps), ("candidates", limits.candidates)):
        _number(body, option, None, int, 0, most_of_it)
    thinking = ThinkingOptions.of({name: body[name] for name in _THINKING if name in body})
    energies = bool(body.get("energies", model.thinks))
    thinking = replace(thinking, final_energy=model.thinks and energies)
    first = 0 if body.get("seed") is not None else secrets.randbelow(1 << 22)
    texts, prompt_tokens = [], 0
    for number, text in enumerate(several, 1):
        tokens = model.texts.prompt(text, number)
        prompt_tokens += len(tokens)
        for i in range(count):
            texts.append(Growing(tokens, most, stops, sampling, thinking, number=first + i, top=max(logprobs, 0)))
    return Asked(texts, bool(body.get("stream")), logprobs, energies, prompt_tokens)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


class Completions:
    """Answers requests of one model.

    Args:
        model: of text.
        name: how /v1/models calls it.
        limits: of requests.
    """

    def __init__(self, model: TextModel, name: str, limits: Limits):
        self.model, self.name, self.limits = model, name, limits
        self.stops_at = math.inf
        self.worker = Worker(Pool(model.predictor, model.texts, limits.rows, limits.length), limits.waiting)

    def stop_soon(self) -> None:
        """Give up requests under way, in GRACE seconds."""
        self.stops_at = time.monotonic() + GRACE

    def grow(self, asked: Asked) -> asyncio.Queue[tuple[int, str]]:
        """Start the texts of a request; the queue gets (number, what its string gained) after each of their tokens."""
        loop, tokens = asyncio.get_running_loop(), asyncio.Queue[tuple[int, str]]()

        def watcher(number: int) -> Any:
            return lambda text, new: loop.call_soon_threadsafe(tokens.put_nowait, (number, new))

        for number, text in enumerate(asked.texts):
            self.worker.pool.check(text)
            text.watch = watcher(number)
        try:
            self.worker.submit(asked.texts)
        except RecipeError as error:
            raise Refused(503, str(error)) from None
        return tokens

    async def pieces(self, asked: Asked, gone: Any) -> AsyncIterator[tuple[int, str]]:
        """Tokens as they come, until all texts are complete; texts are put out if nobody listens any more."""
        tokens, deadline = self.grow(asked), time.monotonic() + self.limits.seconds
        open_texts, heard = set(range(len(asked.texts))), [0] * len(asked.texts)
        looked = 0.0
        try:
            while open_texts:
                if time.monotonic() > looked + _LOOK:
                    if await gone():
                        raise Refused(499, "the client is gone")
                    looked = time.monotonic()
                if time.monotonic() > self.stops_at:
                    raise Refused(503, "the server is being stopped")
                if time.monotonic() > deadline:
                    raise Refused(504, f"not complete within {self.limits.seconds:g} s: ask for less")
                try:
                    number, new = await asyncio.wait_for(tokens.get(), _LOOK)
                except TimeoutError:
                    continue
                text = asked.texts[number]
                heard[number] += 1
                if text.error:
                    raise Refused(500, text.error)
                yield number, new
                if text.done and len(text.draft.tokens) == heard[number]:
                    open_texts.discard(number)
        finally:
            for text in asked.texts:
                text.cancelled = not text.done

    def choice(self, asked: Asked, number: int, at: int | None = None, new: str | None = None) -> dict[str, Any]:
        """A choice: all of a text, or, while it streams, its token `at` alone, which brought the text `new`."""
        text = asked.texts[number]
        draft, part = text.draft, slice(None) if at is None else slice(at, at + 1)
        out: dict[str, Any] = {"index": number, "text": draft.text if new is None else new, "logprobs": None}
        whole = at is None or (text.done and at == len(draft.tokens) - 1)
        out["finish_reason"] = {"length": "length"}.get(draft.finish, "stop") if whole else None
        decode = self.model.texts.tokenizer.decode
        names = [decode([token], skip_special_tokens=False) for token in draft.tokens[part]]
        if asked.logprobs >= 0:
            top = [{decode([t], skip_special_tokens=False): p for t, p in each} for each in text.alternatives[part]]
            out["logprobs"] = {"tokens": names, "token_logprobs": draft.log_p[part], "top_logprobs": top or None}
        if asked.energies:
            energies = [_finite(e) for e in draft.energies[part]]
            out["thinking"] = {"tokens": names, "energies": energies, "steps": draft.steps[part]}
        return out

    def envelope(self, choices: list[dict[str, Any]], identity: str) -> dict[str, Any]:
        """What is around choices."""
        head = {"id": identity, "object": "text_completion", "created": int(time.time()), "model": self.name}
        return head | {"choices": choices}

    async def stream(self, asked: Asked, identity: str, gone: Any) -> AsyncIterator[str]:
        """Server-sent events."""
        shown = [0] * len(asked.texts)
        try:
            async for number, new in self.pieces(asked, gone):
                choice = self.choice(asked, number, shown[number], new)
                shown[number] += 1
                yield f"data: {json.dumps(self.envelope([choice], identity))}\n\n"
        except Refused as error:
            yield f"data: {json.dumps({'error': {'message': str(error), 'code': error.status}})}\n\n"
        yield "data: [DONE]\n\n"

    async def whole(self, asked: Asked, identity: str, gone: Any) -> dict[str, Any]:
        """One answer."""
        async for _ in self.pieces(asked, gone):
            pass
        out = self.envelope([self.choice(asked, number) for number in range(len(asked.texts))], identity)
        made = sum(len(text.draft.tokens) for text in asked.texts)
        usage = {"prompt_tokens": asked.prompt_tokens, "completion_tokens": made}
        return out | {"usage": usage | {"total_tokens": asked.prompt_tokens + made}}


def server(model: TextModel, name: str, limits: Limits | None = None) -> FastAPI:
    """The application: /v1/completions, /v1/models, /v1/think, /health, the page; `state.stop_soon` ends requests."""
    completions = Completions(model, name, limits or Limits())
    worker = completions.worker

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        await asyncio.to_thread(worker.stop)

    web = FastAPI(lifespan=lifespan, title="ebt-serve")
    web.state.stop_soon = completions.stop_soon

    async def body_of(request: Request) -> Any:
        data, limits = bytearray(), completions.limits
        try:
            async with asyncio.timeout(limits.seconds):
                async for part in request.stream():
                    data += part
                    if len(data) > limits.body:
                        raise Refused(413, f"a request has at most {limits.body} bytes")
        except TimeoutError:
            raise Refused(408, f"the body did not come within {limits.seconds:g} s") from None
        try:
            return json.loads(bytes(data))
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"the body is not JSON ({error})") from None

    def error_of(status: int, message: str) -> JSONResponse:
        kind = "invalid_request_error" if status < 500 else "server_error"
        return JSONResponse({"error": {"message": message, "type": kind, "code": status}}, status)

    @web.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> JSONResponse:
        return error_of(error.status, str(error))

    @web.exception_handler(RecipeError)
    @web.exception_handler(DataError)
    async def mistaken(_: Request, error: Exception) -> JSONResponse:
        return error_of(400, str(error))

    @web.get("/", response_class=HTMLResponse)
    async def page() -> str:
        return PAGE.read_text(encoding="utf-8")

    @web.get("/health")
    async def health() -> dict[str, Any]:
        if not worker.is_alive():
            raise Refused(503, "the model's thread has ended")
        return {"status": "ok"} | worker.load

    @web.get("/v1/models")
    async def models() -> dict[str, Any]:
        thinking = model.recipe.thinking.max_steps if model.thinks else None
        about = {"id": name, "object": "model", "owned_by": "ebt-megatron", "thinking_steps": thinking}
        return {"object": "list", "data": [about]}

    @web.post("/v1/completions")
    async def complete(request: Request) -> Any:
        asked = read_request(await body_of(request), model, completions.limits)
        for text in asked.texts:
            worker.pool.check(text)
        identity = f"cmpl-{secrets.token_hex(8)}"
        if asked.stream:
            events = completions.stream(asked, identity, request.is_disconnected)
            return StreamingResponse(events, media_type="text/event-stream")
        return await completions.whole(asked, identity, request.is_disconnected)

    @web.post("/v1/think")
    async def think(request: Request) -> Any:
        body = await body_of(request)
        if not isinstance(body, dict) or not isinstance(body.get("prompt"), str):
            raise Refused(400, "the body must be a JSON object with a prompt, a text")
        steps, top = _number(body, "steps", None, int, 1, completions.limits.steps), _number(body, "top", 5, int, 1, 50)
        tokens = model.texts.prompt(body["prompt"], 1)
        if len(tokens) > completions.limits.length:
            raise Refused(400, f"{len(tokens)} tokens of a prompt are more than {completions.limits.length}")
        thoughts = model.think(body["prompt"], top=top, **({} if steps is None else {"steps": steps}))
        found = await asyncio.wrap_future(worker.use(lambda: list(thoughts)))
        return {"thoughts": [{"step": t.step, "energy": _finite(t.energy), "top": t.top} for t in found]}

    return web
