"""The packaged model behind a socket: what it scores and draws is what the package does."""

import contextlib
import dataclasses
import json
import socket
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")

from fedsafe_jax.cli.serve import http_server  # noqa: E402
from fedsafe_jax.data import packing  # noqa: E402
from fedsafe_jax.data.chat import Encoded  # noqa: E402
from fedsafe_jax.evals.scoring import score_examples  # noqa: E402
from fedsafe_jax.models import lora  # noqa: E402
from fedsafe_jax.serving.admission import Limits  # noqa: E402
from fedsafe_jax.serving.app import make_app  # noqa: E402
from fedsafe_jax.serving.batching import Batcher  # noqa: E402
from fedsafe_jax.serving.served_models import ServedModels  # noqa: E402

BASE, ADAPTED = "package:model", "mine"
KIND = {"content-type": "application/json"}
TEXTS = ("How do I bake bread?", "Hello!", "A cake needs flour, eggs, sugar and some patience.")


@contextlib.contextmanager
def listening(app):
    """Serves an app at a free port; gives its address."""
    taken = socket.create_server(("127.0.0.1", 0))
    server = http_server(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        thread.join(30)


@pytest.fixture(scope="module")
def models(packaged):
    """The packaged model, and under an adapter that changes it."""
    config = lora.LoraConfig(2, 4.0, ("q_proj", "v_proj"))
    factors = lora.init(jax.random.key(0), packaged.config, config)
    factors = jax.tree.map(lambda x: x + 0.02 * jnp.ones_like(x), factors)
    adapter = lora.Adapter(factors, config, BASE)
    return {BASE: packaged, ADAPTED: packaged.with_adapter(adapter)}


@pytest.fixture(scope="module")
def address(models):
    served = ServedModels(models[BASE], BASE, {ADAPTED: models[ADAPTED].adapter})
    app = make_app(served, Batcher(served, 64, 256), Limits(body_bytes=1 << 20))
    with listening(app) as url:
        yield url


def post(address, path, **content):
    reply = httpx.post(f"{address}/{path}", json=content, timeout=100)
    assert reply.status_code == 200, reply.text
    return reply.json()


@pytest.mark.parametrize("name", [BASE, ADAPTED])
def test_echoed_log_probabilities_are_those_of_the_package(models, address, name):
    lm = models[name]
    rows = [lm.tokenizer(text)["input_ids"] for text in TEXTS]
    reply = post(
        address, "completions", model=name, prompt=rows, echo=True, logprobs=1, max_tokens=1,
        temperature=0,
    )  # fmt: skip
    masks = [np.arange(len(ids)) >= 2 for ids in rows]  # the context is two tokens
    encoded = [Encoded(np.asarray(ids), mask) for ids, mask in zip(rows, masks, strict=True)]
    expected, _ = score_examples(lm, encoded, packing.round_up(max(map(len, rows))))
    for choice, ids, total in zip(reply["choices"], rows, expected, strict=True):
        logprobs = choice["logprobs"]
        own = logprobs["token_logprobs"]
        assert len(own) == len(ids) + 1 and own[0] is None
        # As lm-evaluation-harness reads it: the generated token is dropped.
        assert sum(own[2:-1]) == pytest.approx(total, abs=1e-4)
        assert own[-1] == max(logprobs["top_logprobs"][-1].values())
        begin = logprobs["text_offset"][1]
        assert "".join(logprobs["tokens"][1:]) == choice["text"][begin:]
    logits = np.asarray(lm(np.array([ids])))[0]
    is_best = logits[:-1].argmax(-1) == ids[1:]
    tops = logprobs["top_logprobs"][1:-1]
    said = [x == max(top.values()) for x, top in zip(own[1:-1], tops, strict=True)]
    assert said == is_best.tolist()
    assert logprobs["tokens"][-1] in lm.tokenizer.decode([logits[-1].argmax()])


def test_answers_are_those_of_the_package_greedy_and_sampled(models, address):
    sampled = {"temperature": 1.0, "top_p": 0.9, "seed": 7}
    for name, sampling in ((BASE, {"temperature": 0}), (ADAPTED, sampled)):
        reply = post(
            address, "chat/completions", model=name, max_tokens=16,
            messages=[{"role": "user", "content": TEXTS[0]}], **sampling,
        )  # fmt: skip
        (expected,) = models[name].generate(TEXTS[:1], max_new_tokens=16, **sampling)
        assert reply["choices"][0]["message"]["content"].strip() == expected


def test_scores_of_generated_tokens_are_those_of_the_whole_text(models, address):
    ids = models[BASE].tokenizer(TEXTS[0])["input_ids"]
    asked = {"model": BASE, "prompt": ids, "temperature": 0, "logprobs": 1, "max_tokens": 6}
    whole = post(address, "completions", **asked)["choices"][0]
    tops = [max(top.values()) for top in whole["logprobs"]["top_logprobs"]]
    assert whole["logprobs"]["token_logprobs"] == tops  # greedy
    assert "".join(whole["logprobs"]["tokens"]).startswith(whole["text"])


def test_broken_clients_leave_it_serving(address):
    host, port = address.removeprefix("http://").removesuffix("/v1").split(":")
    long = json.dumps({"model": BASE, "prompt": "word " * 2_000_000}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    ask = json.dumps(
        {"model": BASE, "prompt": "Hi", "max_tokens": 100, "stream": True, "temperature": 0}
    ).encode()
    for sent in (
        b"\x00\xff nonsense\r\n\r\n",
        head + b"Content-Length: 1000\r\n\r\n{",  # the rest never comes
        head + b"Content-Length: %d\r\n\r\n" % len(ask) + ask,  # leaves before the answer
    ):
        with socket.create_connection((host, int(port)), timeout=10) as client:
            client.sendall(sent)
    reply = httpx.post(f"{address}/completions", content=long, headers=KIND, timeout=100)
    assert reply.status_code == 413 and reply.json()["error"]["code"] == "request_too_large"
    asked = {"model": BASE, "prompt": "Hi", "max_tokens": 4, "temperature": 0}
    began = time.monotonic()
    assert post(address, "completions", **asked)["usage"]["completion_tokens"] <= 4
    assert time.monotonic() - began < 60


def test_the_openai_client_reads_it(models, address):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=address, api_key="none", max_retries=0) as client:
        assert [one.id for one in client.models.list()] == [BASE, ADAPTED]
        messages = [{"role": "user", "content": "Hello!"}]
        asked = {"model": BASE, "messages": messages, "max_tokens": 24, "temperature": 0}
        whole = client.chat.completions.create(**asked)
        assert whole.choices[0].message.content == models[BASE].generate(["Hello!"])[0]
        assert whole.choices[0].finish_reason == "stop"
        stream = client.chat.completions.create(
            **asked, stream=True, stream_options={"include_usage": True}
        )
        *chunks, last = list(stream)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == whole.choices[0].message.content and last.usage == whole.usage
        with pytest.raises(openai.NotFoundError, match="no model 'eve'"):
            client.chat.completions.create(**(asked | {"model": "eve"}))
        with pytest.raises(openai.BadRequestError) as error:
            client.completions.create(model=BASE, prompt="word " * 5000)
        assert error.value.code == "context_length_exceeded"


def test_several_adapters_of_one_base_share_its_parameters(models):
    served = ServedModels(models[BASE], BASE, {ADAPTED: models[ADAPTED].adapter})
    lms = served._models.values()
    assert len({id(jax.tree.leaves(lm.params)[0]) for lm in lms}) == 1
    small = dataclasses.replace(models[BASE].config, num_layers=1)
    with pytest.raises(Exception, match="belongs to another base"):
        ServedModels(
            dataclasses.replace(models[BASE], config=small), "x", {ADAPTED: models[ADAPTED].adapter}
        )
