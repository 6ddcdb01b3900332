"""The server's routes: keys, sizes and times are checked here, errors get their shape here."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Coroutine, Mapping
from typing import Any, TypeVar

import anyio.to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from fedsafe_jax.data.chat_template import ChatTemplateError
from fedsafe_jax.evals.judges.guard import Guard
from fedsafe_jax.serving import moderation, schema
from fedsafe_jax.serving.admission import Limits, check_caller, read_content
from fedsafe_jax.serving.batching import Batcher
from fedsafe_jax.serving.calls import Call
from fedsafe_jax.serving.errors import ApiError, malformed
from fedsafe_jax.serving.replies import Replies, event
from fedsafe_jax.serving.schema import Asked
from fedsafe_jax.serving.served_models import ServedModels

T = TypeVar("T")


def make_app(
    models: ServedModels | None,
    batcher: Batcher,
    limits: Limits,
    guards: Mapping[str, Guard] | None = None,
) -> Starlette:
    """Makes the ASGI application; the batcher's thread lives as long as it does.

    Args:
      models: what answers; None for guards alone.
      batcher: who does the work, not yet started.
      limits: what one request may be.
      guards: guards by their names, the first for requests that name none.
    """
    server = _Server(models, batcher, limits, guards=guards or {})

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
        Route("/v1/moderations", server.moderate, methods=["POST"]),
    ]
    handlers = {ApiError: _api_error, HTTPException: _http_error, Exception: _any_error}
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)


class _Server:
    def __init__(
        self,
        models: ServedModels | None,
        batcher: Batcher,
        limits: Limits,
        guards: Mapping[str, Guard],
    ):
        self._models, self._batcher, self._limits = models, batcher, limits
        self._guards = guards
        self._names = [*(models.names if models else ()), *guards]
        self._created = int(time.time())

    async def list_models(self, request: Request) -> Response:
        check_caller(request, self._limits)
        data = [self._model(name) for name in self._names]
        return JSONResponse({"object": "list", "data": data})

    async def show_model(self, request: Request) -> Response:
        check_caller(request, self._limits)
        name = request.path_params["name"]
        self._check_name(name, "model", self._names)
        return JSONResponse(self._model(name))

    async def chat(self, request: Request) -> Response:
        asked = schema.read_chat(await read_content(request, self._limits))
        self._check_model(asked.model)
        if asked.top is not None and self._models.is_guarded:
            raise malformed(
                "'logprobs' tells the model's own tokens; this server answers under guards.",
                "logprobs",
            )
        try:
            ids = await anyio.to_thread.run_sync(self._models.render, asked.dialogue)
        except ChatTemplateError as error:
            raise malformed(str(error), "messages") from None
        return await self._answer(request, asked, [ids], [""])

    async def complete(self, request: Request) -> Response:
        asked = schema.read_completion(await read_content(request, self._limits))
        self._check_model(asked.model)
        if self._models.is_guarded:
            raise malformed(
                "This server answers under guards, which read dialogues; ask /v1/chat/completions.",
                "prompt",
            )
        self._check_count(len(asked.prompts) * asked.n, "'prompt' and 'n' ask for", "prompt")
        prompts = await anyio.to_thread.run_sync(self._prompts, asked)
        return await self._answer(request, asked, *prompts)

    async def moderate(self, request: Request) -> Response:
        asked = moderation.read(await read_content(request, self._limits))
        asked = asked._replace(model=asked.model or next(iter(self._guards), ""))
        self._check_name(asked.model, "guard", list(self._guards))
        self._check_count(len(asked.answers), "'input' asks for", "input")
        judging = moderation.judge(asked, self._batcher, self._limits.seconds)
        verdicts = await _unless_left(request, judging)
        if verdicts is None:
            return Response(status_code=400)  # to nobody
        guard = self._guards[asked.model]
        return JSONResponse(moderation.reply(asked.model, guard, verdicts))

    def _check_count(self, count: int, asking: str, param: str) -> None:
        if count > self._batcher.most_waiting:
            raise malformed(
                f"{asking} {count} answers; at most {self._batcher.most_waiting} may wait. Send "
                "fewer at once.",
                param,
            )

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
        try:
            if await _unless_left(request, _to_the_end(call)) is None:
                return Response(status_code=400)  # to nobody
            return JSONResponse(await anyio.to_thread.run_sync(replies.whole, call))
        finally:
            call.cancel()

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

    def _check_model(self, name: str) -> None:
        self._check_name(name, "model", self._models.names if self._models else [])

    def _check_name(self, name: str, kind: str, served: list[str]) -> None:
        if name not in served:
            listed = ", ".join(served) or f"none; `fedsafe serve --{kind}=...` serves one"
            raise ApiError(
                404,
                f"There is no {kind} '{name[:100]}'; served are {listed}.",
                "model",
                code="model_not_found",
            )

    def _model(self, name: str) -> dict:
        owner = {"object": "model", "created": self._created, "owned_by": "fedsafe"}
        if name in self._guards:
            return {"id": name} | owner
        base = self._models.names[0]
        parent = {"parent": base} if name != base else {}
        return {"id": name} | owner | {"max_model_len": self._models.max_length} | parent


async def _to_the_end(call: Call) -> Call:
    async for _ in call.pieces():
        pass
    return call


async def _unless_left(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """Waits for work; None where the client left before."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_until_disconnected(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        leaving.cancel()


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
