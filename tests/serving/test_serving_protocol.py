"""The protocol against a fake model: replies, streams, errors, limits, and who shares a batch."""

import asyncio
import json
import re

import pytest

pytest.importorskip("starlette")
pytest.importorskip("httpx")

from in_process import CHAT, COMPLETION, serving  # noqa: E402


def events(text):
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def test_models_are_listed_and_shown():
    async def body():
        async with serving() as server:
            listed = (await server.client.get("/v1/models")).json()
            assert listed["object"] == "list"
            assert [one["id"] for one in listed["data"]] == ["base", "ada"]
            assert listed["data"][1]["parent"] == "base"
            assert (await server.client.get("/v1/models/ada")).json() == listed["data"][1]
            assert (await server.client.get("/v1/models/eve")).status_code == 404

    asyncio.run(body())


def test_a_completion_has_openais_shape():
    async def body():
        async with serving() as server:
            reply = await server.complete()
            assert reply["object"] == "text_completion" and reply["model"] == "base"
            assert reply["choices"] == [
                {"index": 0, "text": "cba", "finish_reason": "stop", "logprobs": None}
            ]
            tokens = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
            assert reply["usage"] == tokens
            cut = (await server.complete(max_tokens=2))["choices"][0]
            assert (cut["text"], cut["finish_reason"]) == ("cb", "length")

    asyncio.run(body())


def test_prompts_are_texts_or_ids_one_or_several():
    async def body():
        async with serving() as server:
            for prompt, texts in [
                ("ab", ["ba"]),
                ([97, 98], ["ba"]),
                (["ab", "xy"], ["ba", "yx"]),
                ([[97, 98], [99]], ["ba", "c"]),
            ]:
                reply = await server.complete(prompt=prompt)
                assert [one["text"] for one in reply["choices"]] == texts
            reply = await server.complete(prompt=["ab", "xy"], n=2, echo=True)
            assert [one["text"] for one in reply["choices"]] == ["abba", "abba", "xyyx", "xyyx"]
            assert reply["usage"]["prompt_tokens"] == 4

    asyncio.run(body())


def test_a_chat_is_rendered_and_answered():
    async def body():
        async with serving() as server:
            messages = [
                {"role": "developer", "content": "Be"},
                {"role": "user", "content": [{"type": "text", "text": "H"}]},
            ]
            reply = (await server.post("chat/completions", CHAT | {"messages": messages})).json()
            assert reply["object"] == "chat.completion"
            message = {"role": "assistant", "content": "H>resu<eB>metsys<", "refusal": None}
            assert reply["choices"][0]["message"] == message
            reply = (
                await server.post(
                    "chat/completions",
                    CHAT | {"logprobs": True, "top_logprobs": 2, "max_tokens": 2},
                )
            ).json()
            first, second = reply["choices"][0]["logprobs"]["content"]
            assert (first["token"], first["logprob"], first["bytes"]) == ("i", -105.0, [105])
            assert [one["token"] for one in second["top_logprobs"]] == ["a", "b"]

    asyncio.run(body())


def test_echo_with_logprobs_scores_the_prompt():
    """What lm-evaluation-harness asks: it drops the generated token and sums what is left."""

    async def body():
        async with serving() as server:
            asked = {"prompt": [[120, 97], [121, 98, 0]], "echo": True, "logprobs": 1}
            reply = await server.complete(**asked, max_tokens=1)
            one, other = (choice["logprobs"] for choice in reply["choices"])
            assert one["tokens"] == ["x", "a", "a"] and one["text_offset"] == [0, 1, 2]
            assert one["token_logprobs"] == [None, -97.0, -1.0]
            assert one["top_logprobs"] == [None, {"a": -1.0}, {"a": -1.0}]
            assert other["tokens"] == ["y", "b", "<end>", "a"]
            assert other["top_logprobs"][1] == {"a": -1.0, "b": -98.0}
            assert reply["choices"][0]["text"] == "xaa"
            assert {kind for _, kind, _ in server.models.batches} == {"scores"}
            reply = await server.complete(**asked, max_tokens=0)
            assert reply["choices"][0]["logprobs"]["token_logprobs"] == [None, -97.0]
            assert reply["choices"][1]["logprobs"]["tokens"] == ["y", "b", "<end>"]
            # What is generated is scored, the token that ends it too.
            reply = await server.complete(prompt="xy", logprobs=2)
            logprobs = reply["choices"][0]["logprobs"]
            assert logprobs["tokens"] == ["y", "x", "<end>"] and logprobs["text_offset"][0] == 2
            assert logprobs["token_logprobs"] == [-121.0, -120.0, 0.0]

    asyncio.run(body())


def test_a_stop_text_ends_an_answer_before_it():
    async def body():
        async with serving() as server:
            asked = {"prompt": "gfedcba", "stop": ["ef", "zz"], "logprobs": 0}
            choice = (await server.complete(**asked))["choices"][0]
            assert (choice["text"], choice["finish_reason"]) == ("abcd", "stop")
            assert choice["logprobs"]["tokens"] == list("abcdef")
            assert choice["logprobs"]["top_logprobs"] is None

    asyncio.run(body())


def test_a_stream_says_what_the_whole_reply_says():
    async def body():
        async with serving() as server:
            options = {"stream": True, "stream_options": {"include_usage": True}}
            text = "fe€dcba"  # three bytes that a piece may split
            for stop, expected in [((), "dcba"), (("xy",), "dcba"), (("cb",), "d")]:
                prompt = [*reversed(b"dcba")]
                changed = {"prompt": prompt, "stop": list(stop)}
                got = events(
                    (await server.post("completions", COMPLETION | changed | options)).text
                )
                assert got[-1] == "[DONE]" and got[-2]["choices"] == []
                assert "".join(e["choices"][0]["text"] for e in got[:-2]) == expected
                assert got[-3]["choices"][0]["finish_reason"] == "stop"
            prompt = [*reversed(text.encode())]
            got = events(
                (
                    await server.post(
                        "completions", COMPLETION | options | {"prompt": prompt, "max_tokens": 20}
                    )
                ).text
            )
            assert "".join(e["choices"][0]["text"] for e in got[:-2]) == text
            got = events((await server.post("chat/completions", CHAT | options | {"n": 2})).text)
            deltas = [e["choices"][0]["delta"] for e in got[:-2] if e["choices"][0]["index"] == 1]
            assert deltas[0]["role"] == "assistant" and "role" not in deltas[1]
            assert "".join(delta["content"] for delta in deltas) == "iH>resu<"

    asyncio.run(body())


@pytest.mark.parametrize(
    ("path", "content", "status", "param", "message"),
    [
        ("completions", b"{", 400, None, "no JSON"),
        ("completions", b"[" * 100_000, 400, None, "nested"),
        ("completions", b"\xff\xfe", 400, None, "no JSON"),
        ("completions", [1], 400, None, "must be a JSON object"),
        ("completions", {"prompt": "a"}, 400, "model", "missing"),
        ("completions", {"model": "base"}, 400, "prompt", "missing"),
        ("completions", COMPLETION | {"model": "eve"}, 404, "model", "served are base, ada"),
        ("completions", COMPLETION | {"prompt": []}, 400, "prompt", "must be a text"),
        ("completions", COMPLETION | {"prompt": ""}, 400, "prompt", "no tokens"),
        ("completions", COMPLETION | {"prompt": [1, 300]}, 400, "prompt", "ids below 256"),
        ("completions", COMPLETION | {"prompt": [[1, -1]]}, 400, "prompt", "whole numbers"),
        ("completions", COMPLETION | {"prompt": [1.5]}, 400, "prompt", "must be a text"),
        ("completions", COMPLETION | {"prompt": "a" * 60}, 400, "prompt", "context is 64"),
        ("completions", COMPLETION | {"prompt": ["a"] * 17}, 400, "prompt", "at most 16"),
        ("completions", b'{"model": "base", "prompt": "\\ud800"}', 400, "prompt", "surrogate"),
        ("completions", COMPLETION | {"max_tokens": -1}, 400, "max_tokens", "whole number"),
        ("completions", COMPLETION | {"max_tokens": 0}, 400, "max_tokens", "echo"),
        ("completions", COMPLETION | {"max_tokens": True}, 400, "max_tokens", "whole number"),
        ("completions", COMPLETION | {"temperature": 1e-30}, 400, "temperature", "0.01"),
        ("completions", COMPLETION | {"temperature": 10**400}, 400, "temperature", "number"),
        ("completions", b'{"model":"base","prompt":"a","top_p":NaN}', 400, "top_p", "number"),
        ("completions", COMPLETION | {"logprobs": True}, 400, "logprobs", "whole number"),
        ("completions", COMPLETION | {"logprobs": 1, "stream": True}, 400, "logprobs", "stream"),
        ("completions", COMPLETION | {"stop": [""]}, 400, "stop", "letters"),
        ("completions", COMPLETION | {"stop": 3}, 400, "stop", "list of texts"),
        ("completions", COMPLETION | {"best_of": 3}, 400, "best_of", "not served"),
        ("completions", COMPLETION | {"topp": 3}, 400, "topp", "Unknown field"),
        ("chat/completions", CHAT | {"messages": "Hi"}, 400, "messages", "list of"),
        ("chat/completions", CHAT | {"messages": [1]}, 400, "messages", "messages\\[0\\]"),
        ("chat/completions", CHAT | {"tools": [{}]}, 400, "tools", "not served"),
        ("chat/completions", CHAT | {"top_logprobs": 2}, 400, "top_logprobs", "needs"),
        (
            "chat/completions",
            CHAT | {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            400,
            "messages",
            "type 'text'",
        ),
        ("nothing", {}, 404, None, "Not Found"),
    ],
)
def test_what_is_wrong_is_an_error_in_openais_shape(path, content, status, param, message):
    async def body():
        async with serving() as server:
            reply = await server.post(path, content)
            error = reply.json()["error"]
            assert reply.status_code == status and error.keys() == {
                "message",
                "type",
                "param",
                "code",
            }
            assert error["param"] == param and error["type"] == "invalid_request_error"
            assert re.search(message, error["message"]), error["message"]
            assert "\n" not in error["message"]
            assert await server.is_serving()

    asyncio.run(body())
