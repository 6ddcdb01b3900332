"""A server of the fake model, asked without a socket."""

import contextlib
import json

import httpx
from fake_models import FakeModels

from fedsafe_jax.serving.admission import Limits
from fedsafe_jax.serving.app import make_app
from fedsafe_jax.serving.batching import Batcher

COMPLETION = {"model": "base", "prompt": "abc", "max_tokens": 8, "temperature": 0}
CHAT = {"model": "base", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0}


class Server:
    def __init__(self, client, models, batcher):
        self.client, self.models, self.batcher = client, models, batcher

    async def post(self, path, content, **options):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        headers = {"content-type": "application/json"} | options.get("headers", {})
        return await self.client.post(f"/v1/{path}", content=body, headers=headers)

    async def complete(self, **changes):
        reply = await self.post("completions", COMPLETION | changes)
        assert reply.status_code == 200, reply.text
        return reply.json()

    async def is_serving(self):
        return (await self.complete())["choices"][0]["text"] == "cba"


@contextlib.asynccontextmanager
async def serving(batch_size=8, most_waiting=16, guards=None, **limits):
    models = FakeModels()
    batcher = Batcher(models, batch_size, most_waiting, guards=guards)
    app = make_app(models, batcher, Limits(**limits), guards=guards)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with app.router.lifespan_context(app):
        async with httpx.AsyncClient(
            transport=transport, base_url="http://x", timeout=20
        ) as client:
            yield Server(client, models, batcher)
