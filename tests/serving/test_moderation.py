"""Guards behind `/v1/moderations`: the shape, whose inputs share a batch, what real guards say."""

import asyncio

import jax
import numpy as np
import pytest

pytest.importorskip("starlette")
pytest.importorskip("httpx")
pytest.importorskip("uvicorn")

from in_process import serving  # noqa: E402
from test_served_model import listening  # noqa: E402

from fedsafe_jax.data.examples import Example  # noqa: E402
from fedsafe_jax.evals.judges import FAILED, Answered, Verdict, guard  # noqa: E402
from fedsafe_jax.evals.judges.guard import Guard  # noqa: E402
from fedsafe_jax.filters import store  # noqa: E402
from fedsafe_jax.filters.classifier import ClassifierFilter  # noqa: E402
from fedsafe_jax.filters.decision import Decision, flag  # noqa: E402
from fedsafe_jax.models.encoder import Classifier, EncoderConfig  # noqa: E402
from fedsafe_jax.serving.admission import Limits  # noqa: E402
from fedsafe_jax.serving.app import make_app  # noqa: E402
from fedsafe_jax.serving.batching import Batcher  # noqa: E402
from fedsafe_jax.serving.moderation import reply  # noqa: E402

DIALOGUE = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "bad"}]


class Told:
    """A guard that reads "bad" for harm of S1 and says nothing of "?"."""

    def __init__(self):
        self.batches = []

    def guard(self):
        return Guard(self.judge, {"S1": "Violent Crimes", "S2": "Hate"})

    def judge(self, answers):
        self.batches.append(list(answers))
        if any(one.answer == "!" for one in answers):
            raise RuntimeError("out of memory")
        return [self.verdict(one.answer) for one in answers]

    def verdict(self, text):
        if text == "?":
            return FAILED
        return Verdict(False, 0.25, "S1", hazards=(("S1", 0.25),)) if "bad" in text else SAFE


SAFE = Verdict(True, 0.75)


def test_results_have_openais_shape_in_the_order_of_inputs():
    async def body():
        told = Told()
        async with serving(guards={"guard": told.guard(), "other": Told().guard()}) as server:
            asked = {"model": "guard", "input": ["good", "bad", "good"]}
            got = (await server.post("moderations", asked)).json()
            assert got["id"].startswith("modr-") and got["model"] == "guard"
            assert [one["flagged"] for one in got["results"]] == [False, True, False]
            good, bad, _ = got["results"]
            assert bad["categories"] == {"unsafe": True, "Violent Crimes": True, "Hate": False}
            scores = {"unsafe": 0.75, "Violent Crimes": 0.75, "Hate": 0.0}
            assert bad["category_scores"] == scores and not any(good["categories"].values())
            assert good["category_scores"]["unsafe"] == 0.25
            assert bad["category_applied_input_types"]["Hate"] == ["text"]
            assert len(told.batches) == 1  # all inputs of a request
            listed = (await server.client.get("/v1/models")).json()["data"]
            assert [one["id"] for one in listed] == ["base", "ada", "guard", "other"]
            assert (await server.client.get("/v1/models/guard")).json()["id"] == "guard"

    asyncio.run(body())


def test_inputs_are_texts_parts_and_dialogues():
    async def body():
        told = Told()
        async with serving(guards={"guard": told.guard()}) as server:
            alone = Answered((("user", ""),), "bad")
            answer = Answered((("user", "Why?"),), "bad")
            parts = [{"type": "text", "text": "ba"}, {"type": "text", "text": "d"}]
            for given, read in [
                ("bad", [alone]),
                (parts, [alone]),
                (DIALOGUE, [answer]),
                ([DIALOGUE, "bad", parts], [answer, alone, alone]),
            ]:
                got = await server.post("moderations", {"input": given})  # the first guard
                assert [one["flagged"] for one in got.json()["results"]] == [True] * len(read)
                assert told.batches[-1] == read

    asyncio.run(body())


def test_inputs_of_waiting_requests_share_a_batch():
    async def body():
        told = Told()
        async with serving(batch_size=64, most_waiting=64, guards={"g": told.guard()}) as server:
            server.models.gate.clear()
            first = asyncio.ensure_future(server.complete())
            while not server.models.batches:
                await asyncio.sleep(0.005)
            texts = [f"bad {i}" if i % 3 else f"good {i}" for i in range(30)]
            asked = [server.post("moderations", {"input": text}) for text in texts]
            waiting = [asyncio.ensure_future(one) for one in asked]
            while len(server.batcher._waiting) < 30:
                await asyncio.sleep(0.005)
            server.models.gate.set()
            for text, got in zip(texts, await asyncio.gather(*waiting), strict=True):
                assert got.json()["results"][0]["flagged"] == ("bad" in text)
            assert [len(batch) for batch in told.batches] == [30]
            assert (await first)["choices"][0]["text"] == "cba"

    asyncio.run(body())


@pytest.mark.parametrize(
    ("content", "status", "param", "message"),
    [
        ({}, 400, "input", "missing"),
        ({"input": []}, 400, "input", "must be a text"),
        ({"input": 3}, 400, "input", "must be a text"),
        ({"input": ["a", 3]}, 400, "input", "input\\[1\\]"),
        ({"input": "a", "top": 3}, 400, "top", "Unknown field"),
        ({"input": [{"type": "image_url", "image_url": {}}]}, 400, "input", "type 'text'"),
        ({"input": DIALOGUE[:1]}, 400, "input", "end with the assistant's"),
        ({"input": DIALOGUE[1:]}, 400, "input", "end with the assistant's"),
        ({"input": [[{"role": "eve", "content": "a"}]]}, 400, "input", "input\\[0\\]\\[0\\].role"),
        ({"input": ["a"] * 17}, 400, "input", "17 answers; at most 16"),
        ({"input": "a", "model": "base"}, 404, "model", "no guard 'base'; served are guard"),
        ({"input": ["good", "?"]}, 500, "input", "no verdict on 'input\\[1\\]'"),
        ({"input": "!"}, 500, None, "server's log"),
    ],
)
def test_what_is_wrong_is_an_error_and_nothing_passes_unread(content, status, param, message):
    async def body():
        async with serving(guards={"guard": Told().guard()}) as server:
            got = await server.post("moderations", content)
            error = got.json()["error"]
            assert (got.status_code, error["param"]) == (status, param)
            with pytest.raises(AssertionError, match=message):
                raise AssertionError(error["message"])
            assert not (await server.post("moderations", {"input": "ok"})).json()["results"][0][
                "flagged"
            ]
            assert await server.is_serving()

    asyncio.run(body())


def test_keys_and_missing_guards():
    async def body():
        async with serving(api_key="secret") as server:
            assert (await server.post("moderations", {"input": "a"})).status_code == 401
            key = {"authorization": "Bearer secret"}
            got = await server.post("moderations", {"input": "a"}, headers=key)
            assert got.status_code == 404 and "--guard=" in got.json()["error"]["message"]

    asyncio.run(body())


def test_a_controversial_answer_is_told_from_an_unsafe_one():
    qwen = Guard(lambda answers: [], {"Violent": "Violent"}, ("unsafe", "controversial"))
    said = Verdict(False, 0.25, "controversial: Violent", hazards=(("Violent", 0.25),))
    (result,) = reply("g", qwen, [said])["results"]
    assert result["categories"] == {"unsafe": True, "controversial": True, "Violent": True}
    (result,) = reply("g", qwen, [said._replace(label="unsafe", hazards=())])["results"]
    assert result["categories"] == {"unsafe": True, "controversial": False, "Violent": False}


def test_the_openai_client_reads_a_trained_filters_verdicts(tmp_path, packaged):
    """By the filter's own threshold, and without a language model."""
    openai = pytest.importorskip("openai")
    config = EncoderConfig(
        len(packaged.tokenizer), hidden_size=32, intermediate_size=32, num_layers=1, num_heads=2,
        max_length=64,
    )  # fmt: skip
    zeros = np.zeros((1, 8), np.int32)
    params = Classifier(config).init(jax.random.key(0), zeros, zeros, zeros)["params"]
    made = ClassifierFilter(config, params, packaged.tokenizer, max_length=64)
    texts = ["Mix flour and water.", "No.", "word " * 200, "?"]
    scores = made.score([Example((("user", ""),), text.strip()) for text in texts])
    threshold = float(np.sort(scores)[1:3].mean())
    store.save(made._replace(decision=Decision(threshold=threshold)), tmp_path)
    guards = {"filter": guard.load(str(tmp_path), None)}
    app = make_app(None, Batcher(None, 8, 16, guards=guards), Limits(), guards=guards)
    with listening(app) as url:
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            assert [model.id for model in client.models.list()] == ["filter"]
            results = client.moderations.create(input=texts).results
            assert [one.flagged for one in results] == flag(scores, threshold).tolist()
            assert {one.flagged for one in results} == {False, True}
            told = [one.category_scores.model_dump()["unsafe"] for one in results]
            np.testing.assert_allclose(told, scores, atol=1e-6)  # 1 - (1 - p), p in float32
            with pytest.raises(openai.NotFoundError, match="--model="):
                client.completions.create(model="base", prompt="Hi")
