"""The server's routes: keys, sizes and times are checked here, errors get their shape here."""

import asyncio
import contextlib
import hmac
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NamedTuple

import anyio.to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from fedsafe_jax.data.chat_template import ChatTemplateError
from fedsafe_jax.serving import schema
from fedsafe_jax.serving.batching import Batcher
from fedsafe_jax.serving.calls import Call
from fedsafe_jax.serving.errors import ApiError, malformed
from fedsafe_jax.serving.hosts import check_host
from fedsafe_jax.serving.replies import Replies, event
from fedsafe_jax.serving.schema import Asked
from fedsafe_jax.serving.served_models import ServedModels

# A client that is still sending does not read: what is too long is read and thrown away, up to this
# many times the limit, so that it gets its answer and not a broken connection.
DRAINED = 16


class Limits(NamedTuple):
    """What one request may be.

    Attributes:
      body_bytes: size of its body.
      prompt_tokens: tokens of a prompt.
      seconds: time until it is answered, or its stream has ended.
      api_key: what it must bring; "" for nothing.
      hosts: names that it may call the server by; none for any.
    """

    body_bytes: int = 4 << 20
    prompt_tokens: int = 1 << 20
    seconds: float = 600.0
    api_key: str = ""
    hosts: frozenset[str] = frozenset()


def make_app(models: ServedModels, batcher: Batcher, limits: Limits) -> Starlette:
    """Makes the ASGI application; the batcher's thread lives as long as it does.

    Args:
      models: what is served.
      batcher: who does the work, not yet started.
      limits: what one request may be.
    """
    server = _Server(models, batcher, limits)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        batcher.start()
        yield
        await anyio.to_thread.run_sync(batcher.close)

    routes = [
        Route("/v1/models", server.list_models, methods=["GET"]),
        Route("/v1/models/{name:path}", server.show_model, methods=["GET"]),
        Route("/v1/chat/completions", server.chat, methods=["POST"]),
        Route("/v1/completions", server.complete, methods=["POST"]),
    ]
    handlers = {ApiError: _api_error, HTTPException: _http_error, Exception: _any_error}
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)


class _Server:
    def __init__(self, models: ServedModels, batcher: Batcher, limits: Limits):
        self._models, self._batcher, self._limits = models, batcher, limits
        self._created = int(time.time())

    async def list_models(self, request: Request) -> Response:
        self._check_caller(request)
        data = [self._model(name) for name in self._models.names]
        return JSONResponse({"object": "list", "data": data})

    async def show_model(self, request: Request) -> Response:
        self._check_caller(request)
        name = request.path_params["name"]
        self._check_model(name)
        return JSONResponse(self._model(name))

    async def chat(self, request: Request) -> Response:
        async def answer(content: dict) -> Response:
            asked = schema.read_chat(content)
            self._check_model(asked.model)
            try:
                ids = await anyio.to_thread.run_sync(self._models.render, asked.dialogue)
            except ChatTemplateError as error:
                raise malformed(str(error), "messages") from None
            return await self._answer(request, asked, [ids], [""])

        return await self._with_content(request, answer)

    async def complete(self, request: Request) -> Response:
        async def answer(content: dict) -> Response:
            asked = schema.read_completion(content)
            self._check_model(asked.model)
            if len(asked.prompts) * asked.n > self._batcher.most_waiting:
                raise malformed(
                    f"'prompt' and 'n' ask for {len(asked.prompts) * asked.n} answers; at most "
                    f"{self._batcher.most_waiting} may wait. Send fewer at once.",
                    "prompt",
                )
            prompts = await anyio.to_thread.run_sync(self._prompts, asked)
            return await self._answer(request, asked, *prompts)

        return await self._with_content(request, answer)

    def _prompts(self, asked: Asked) -> tuple[list[list[int]], list[str]]:
        """Returns the token ids and the text of each prompt."""
        rows, texts = [], []
        for i, prompt in enumerate(asked.prompts):
            if isinstance(prompt, str):
                ids, text = self._models.encode(prompt), prompt
            else:
                ids = list(prompt)
                if max(ids, default=0) >= self._models.vocab_size:
                    raise malformed(
                        f"'prompt[{i}]' holds the token id {max(ids)}; the model has ids below "
                        f"{self._models.vocab_size}.",
                        "prompt",
                    )
                text = self._models.decode(ids, skip_special_tokens=False)
            if not ids:
                raise malformed(f"'prompt[{i}]' has no tokens.", "prompt")
            rows.append(ids)
            texts.append(text)
        return rows, texts

    async def _with_content(
        self, request: Request, answer: Callable[[dict], Awaitable[Response]]
    ) -> Response:
        self._check_caller(request)
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            # Any web page may have a browser send other types to this machine, unasked.
            raise ApiError(415, "Send JSON, with the header 'Content-Type: application/json'.")
        try:
            async with asyncio.timeout(self._limits.seconds):
                body = await _read_body(request, self._limits.body_bytes)
        except TimeoutError:
            raise ApiError(408, "The body did not come in time.", code="timeout") from None
        except ClientDisconnect:
            return Response(status_code=400)  # to nobody
        return await answer(schema.read_json(body))

    async def _answer(
        self, request: Request, asked: Asked, prompts: list[list[int]], texts: list[str]
    ) -> Response:
        asked = self._with_length(asked, max(map(len, prompts)))
        call = Call(
            asked,
            prompts,
            models=self._models,
            batcher=self._batcher,
            timeout_s=self._limits.seconds,
        )
        replies = Replies(asked, self._models, texts)
        if asked.stream:
            return await _stream(call, replies, asked.usage)
        work = asyncio.ensure_future(_to_the_end(call))
        leaving = asyncio.ensure_future(_until_disconnected(request))
        try:
            await asyncio.wait((work, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                return Response(status_code=400)  # to nobody
            work.result()
            return JSONResponse(await anyio.to_thread.run_sync(replies.whole, call))
        finally:
            call.cancel()
            work.cancel()
            leaving.cancel()

    def _with_length(self, asked: Asked, tokens: int) -> Asked:
        """Returns a request with its longest answer set, given the tokens of its prompt."""
        param = "messages" if asked.kind == "chat" else "prompt"
        if tokens > self._limits.prompt_tokens:
            raise malformed(
                f"The prompt has {tokens} tokens; this server takes at most "
                f"{self._limits.prompt_tokens}.",
                param,
                code="context_length_exceeded",
            )
        most = asked.max_tokens
        if most is None:
            room = self._models.max_length - tokens
            most = max(1, min(schema.DEFAULT_TOKENS[asked.kind], room))
        if tokens + most > self._models.max_length:
            raise malformed(
                f"The model's context is {self._models.max_length} tokens; the prompt has "
                f"{tokens}, and {most} may be generated. Shorten it or lower "
                "max_tokens.",
                param,
                code="context_length_exceeded",
            )
        return asked._replace(max_tokens=most)

    def _check_caller(self, request: Request) -> None:
        check_host(request, self._limits.hosts)
        if not self._limits.api_key:
            return
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        is_right = hmac.compare_digest(key.strip().encode("latin-1"), self._limits.api_key.encode())
        if kind.lower() != "bearer" or not is_right:
            raise ApiError(
                401,
                "Wrong or no API key; send 'Authorization: Bearer KEY'.",
                code="invalid_api_key",
            )

    def _check_model(self, name: str) -> None:
        if name not in self._models.names:
            raise ApiError(
                404,
                f"There is no model '{name[:100]}'; served are {', '.join(self._models.names)}.",
                "model",
                code="model_not_found",
            )

    def _model(self, name: str) -> dict:
        owner = {"object": "model", "created": self._created, "owned_by": "fedsafe"}
        base = self._models.names[0]
        parent = {"parent": base} if name != base else {}
        return {"id": name} | owner | {"max_model_len": self._models.max_length} | parent


async def _read_body(request: Request, most: int) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size <= most:
            parts.append(part)
        else:
            parts.clear()
        if size > DRAINED * most:
            break
    if size > most:
        raise ApiError(
            413, f"The body is larger than {most} bytes; send less.", code="request_too_large"
        )
    return b"".join(parts)


async def _to_the_end(call: Call) -> None:
    async for _ in call.pieces():
        pass


async def _until_disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _stream(call: Call, replies: Replies, usage: bool) -> Response:
    pieces = call.pieces()
    try:
        # An error before anything is sent is still a status.
        first = await anext(pieces)
    except BaseException:
        call.cancel()
        raise

    async def events() -> AsyncIterator[str]:
        try:
            yield event(replies.piece(*first))
            async for choice, new in pieces:
                yield event(replies.piece(choice, new))
            if usage:
                yield event(replies.usage(call))
            yield event("[DONE]")
        except ApiError as error:
            yield event(error.body())

    return _Events(call, events())


class _Events(StreamingResponse):
    """A stream whose work ends with it, also where a client left while it was sent to."""

    def __init__(self, call: Call, events: AsyncIterator[str]):
        headers = {"cache-control": "no-cache"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._call = call

    async def __call__(self, *given: Any) -> None:
        try:
            await super().__call__(*given)
        finally:
            self._call.cancel()


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    headers = {"retry-after": "1"} if error.status == 429 else None
    if error.status == 401:
        headers = {"www-authenticate": "Bearer"}
    return JSONResponse(error.body(), status_code=error.status, headers=headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path[:100]
    message = f"{request.method} {path}: {error.detail}."
    body = ApiError(error.status_code, message).body()
    return JSONResponse(body, status_code=error.status_code, headers=error.headers)


async def _any_error(request: Request, error: Exception) -> Response:
    return JSONResponse(ApiError(500, "An error of the server; see its log.").body(), 500)
