"""Models under guards behind the API: whole answers to chats, and nothing around the guards."""

import contextlib

import httpx
import numpy as np
import pytest
from in_process import Server

from fedsafe_jax.data.refusals import REFUSAL
from fedsafe_jax.guarding import decodings, guardian
from fedsafe_jax.guarding.guarded_model import Guards, guard_model
from fedsafe_jax.guarding.guardian import Guardian
from fedsafe_jax.inference.sampling import Sampling
from fedsafe_jax.serving.admission import Limits
from fedsafe_jax.serving.app import make_app
from fedsafe_jax.serving.batching import Batcher
from fedsafe_jax.serving.guarded_models import GuardedModels
from fedsafe_jax.serving.served_models import Draw

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend():
    return "asyncio"


def of_colours(dialogues, answers):
    del answers
    return np.array(["colour" in turns[-1][1] for turns in dialogues])


@contextlib.asynccontextmanager
async def serving(lm, guards):
    models = GuardedModels(
        lm, "m", {}, lambda one: guard_model(one, guards), batch_size=8, max_length=64
    )
    batcher = Batcher(models, 8, 16)
    app = make_app(models, batcher, Limits())
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with app.router.lifespan_context(app):
        async with httpx.AsyncClient(
            transport=transport, base_url="http://x", timeout=120
        ) as client:
            yield Server(client, models, batcher)


def chat(text, **changes):
    content = {"model": "m", "messages": [{"role": "user", "content": text}], "temperature": 0}
    return content | {"max_tokens": 12} | changes


DOOR = Guards(guardian=Guardian(of_colours, reads_request=True, reply=guardian.refusing))


async def test_chats_are_answered_under_the_guards(packaged):
    plain = packaged.generate(["Hello!"], max_new_tokens=12)
    async with serving(packaged, DOOR) as server:
        said = [
            (await server.post("chat/completions", chat(text, max_tokens=24))).json()
            for text in ("Name a colour.", "Hello!")
        ]
        assert [one["choices"][0]["message"]["content"] for one in said][0] == REFUSAL
        assert [one["choices"][0]["finish_reason"] for one in said] == ["stop", "stop"]
        assert said[1]["choices"][0]["message"]["content"].startswith(plain[0])


async def test_a_stream_tells_whole_answers(packaged):
    async with serving(packaged, DOOR) as server:
        reply = await server.post("chat/completions", chat("Name a colour.", stream=True))
        assert reply.text.count("content") <= 2  # the role's piece and the answer's
        assert REFUSAL in reply.text.replace("\\u2019", "'")


async def test_samples_of_one_request_are_those_of_the_guarded_model(packaged):
    guards = Guards(decodings.parse("beam:candidates=2,keep=1,block=4"))
    lm = guard_model(packaged, guards)
    expected, _ = lm.answer_dialogues([(("user", "Hello!"),)] * 2, 8, temperature=1.0, seed=5)
    async with serving(packaged, guards) as server:
        asked = chat("Hello!", n=2, temperature=1.0, seed=5, max_tokens=8)
        reply = (await server.post("chat/completions", asked)).json()
    assert [one["message"]["content"] for one in reply["choices"]] == expected


def test_a_sample_is_that_of_its_place_whatever_is_answered_beside_it(packaged):
    """The second answer of one request, in a batch with another request of the same seed."""
    lm = guard_model(packaged, DOOR)
    dialogues = [(("user", text),) for text in ("Hello!", "What is two plus two?")]
    expected, _ = lm.answer_dialogues(dialogues[:1] * 2, 8, temperature=1.0, seed=5)
    other, _ = lm.answer_dialogues(dialogues[1:], 8, temperature=1.0, seed=5)
    models = GuardedModels(packaged, "m", {}, lambda one: guard_model(one, DOOR))
    draws = [
        Draw((), 8, 5, place=1, dialogue=dialogues[0]),
        Draw((), 8, 5, place=0, dialogue=dialogues[1]),
    ]
    (answers,) = models.generate(["m", "m"], Sampling(1.0), draws)
    assert [packaged.text(ids) for ids, _ in answers] == [expected[1], other[0]]


@pytest.mark.parametrize(
    ("path", "content", "named"),
    [
        ("completions", {"model": "m", "prompt": "Name a"}, "ask /v1/chat/completions"),
        ("chat/completions", chat("Hello!", logprobs=True, top_logprobs=2), "under guards"),
    ],
)
async def test_what_would_go_around_the_guards_is_refused(packaged, path, content, named):
    async with serving(packaged, DOOR) as server:
        reply = await server.post(path, content)
    assert reply.status_code == 400
    assert named in reply.json()["error"]["message"]
