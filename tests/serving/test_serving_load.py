"""Many clients, keys, sizes and times: what is refused, what shares a batch, what goes on."""

import asyncio

import pytest

pytest.importorskip("starlette")
pytest.importorskip("httpx")

from in_process import CHAT, COMPLETION, serving  # noqa: E402


def prompts(server):
    return [batch[2] for batch in server.models.batches]


async def waiting(server, count):
    """Waits until jobs are in the queue."""
    for _ in range(1000):
        if len(server.batcher._waiting) == count:
            return
        await asyncio.sleep(0.005)
    raise AssertionError(f"{len(server.batcher._waiting)} wait, not {count}")


async def busy(server):
    """Lets the worker stand in a batch, so that what comes next waits; returns its request."""
    server.models.gate.clear()
    first = asyncio.ensure_future(server.post("completions", COMPLETION))
    for _ in range(1000):
        if server.models.batches:
            return first
        await asyncio.sleep(0.005)
    raise AssertionError("the worker has not begun")


def test_what_waits_with_the_same_settings_is_one_batch():
    async def body():
        async with serving(batch_size=4) as server:
            first = await busy(server)
            asked = [{"prompt": x} for x in "abcde"]
            asked += [{"prompt": "f", "temperature": 1}, {"prompt": "g", "model": "ada"}]
            asked += [{"prompt": "h", "max_tokens": 40}]
            asked += [{"prompt": "ij", "echo": True, "logprobs": 1, "max_tokens": 1}]
            asked += [{"prompt": "k", "echo": True, "logprobs": 1, "max_tokens": 0}]
            replies = []
            for changes in asked:  # one after the other, so that their order is known
                replies.append(asyncio.ensure_future(server.complete(**changes)))
                await waiting(server, len(replies))
            server.models.gate.set()
            texts = [(await reply)["choices"][0]["text"] for reply in replies]
            assert texts == [*"abcdefgh", "ija", "k"]
            assert (await first).status_code == 200
            groups = [["a", "b", "c", "d"], ["e", "g"], ["f"], ["h"], ["ij", "k"]]
            assert prompts(server)[1:] == groups
            assert server.models.batches[2][0] == ["base", "ada"]

    asyncio.run(body())


def test_two_hundred_requests_of_twenty_clients_are_answered_right():
    async def body():
        async with serving(batch_size=20, most_waiting=40) as server:

            async def client(number):
                for turn in range(10):
                    text = f"{number} {turn}"
                    reply = await server.complete(prompt=text)
                    assert reply["choices"][0]["text"] == text[::-1]

            await asyncio.gather(*map(client, range(20)))
            assert len(server.models.batches) < 40  # of 10 at best

    asyncio.run(body())


def test_a_full_queue_refuses_and_goes_on():
    async def body():
        async with serving(most_waiting=2) as server:
            first = await busy(server)
            kept = asyncio.ensure_future(server.complete(prompt=["ab", "cd"]))
            await waiting(server, 2)
            refused = await server.post("completions", COMPLETION)
            assert refused.status_code == 429 and refused.headers["retry-after"]
            assert refused.json()["error"]["code"] == "rate_limit_exceeded"
            server.models.gate.set()
            assert [one["text"] for one in (await kept)["choices"]] == ["ba", "dc"]
            assert (await first).status_code == 200 and await server.is_serving()

    asyncio.run(body())


def test_a_request_that_takes_too_long_ends():
    async def body():
        async with serving(seconds=0.2) as server:
            first = await busy(server)
            late = await server.post("completions", COMPLETION)
            assert late.status_code == 504 and late.json()["error"]["code"] == "timeout"
            assert (await first).status_code == 504
            server.models.gate.set()
            assert await server.is_serving()
            assert prompts(server) == [["abc"], ["abc"]]  # nobody waited for the second

    asyncio.run(body())


def test_a_client_that_leaves_frees_the_worker():
    async def body():
        async with serving() as server:
            first = await busy(server)
            leaving = asyncio.ensure_future(server.complete(prompt="never"))
            await waiting(server, 1)
            first.cancel()
            leaving.cancel()
            await asyncio.gather(first, leaving, return_exceptions=True)
            server.models.gate.set()
            assert await server.is_serving()
            assert prompts(server) == [["abc"], ["abc"]]

    asyncio.run(body())


def test_a_failure_is_of_its_batch_alone(caplog):
    async def body():
        async with serving() as server:
            reply = await server.post("completions", COMPLETION | {"prompt": "!"})
            assert reply.status_code == 500
            assert reply.json()["error"]["type"] == "server_error"
            assert "memory" not in reply.text  # that is for the server's log
            streamed = await server.post(
                "completions", COMPLETION | {"prompt": "!", "stream": True}
            )
            assert streamed.status_code == 500
            assert await server.is_serving()

    asyncio.run(body())
    assert "a batch of 1 prompts failed" in caplog.text


def test_a_key_is_asked_of_every_endpoint():
    async def body():
        async with serving(api_key="secret") as server:
            for header in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
                for reply in (
                    await server.client.get("/v1/models", headers=header),
                    await server.client.get("/v1/models/base", headers=header),
                    await server.post("completions", COMPLETION, headers=header),
                    await server.post("chat/completions", b"{", headers=header),
                ):
                    assert reply.status_code == 401
                    assert reply.json()["error"]["code"] == "invalid_api_key"
            assert not server.models.batches
            right = {"authorization": "Bearer secret"}
            assert (await server.post("chat/completions", CHAT, headers=right)).status_code == 200

    asyncio.run(body())


def test_a_page_in_a_browser_cannot_ask():
    """What a page may send to any host without asking it first is not taken."""

    async def body():
        async with serving() as server:
            for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
                reply = await server.post("completions", COMPLETION, headers={"content-type": kind})
                assert reply.status_code == 415
                assert "Content-Type: application/json" in reply.json()["error"]["message"]
            asked = await server.client.options("/v1/completions")
            assert asked.status_code == 405 and not server.models.batches

    asyncio.run(body())


def test_sizes_are_limited():
    async def body():
        async with serving(body_bytes=1000, prompt_tokens=20) as server:
            for size in (1001, 10_000_000):
                reply = await server.post("completions", COMPLETION | {"prompt": "a" * size})
                assert reply.status_code == 413
                assert reply.json()["error"]["code"] == "request_too_large"
            reply = await server.post("completions", COMPLETION | {"prompt": "a" * 21})
            error = reply.json()["error"]
            assert (reply.status_code, error["code"]) == (400, "context_length_exceeded")
            messages = [{"role": "user", "content": "a" * 21}]
            reply = await server.post("chat/completions", CHAT | {"messages": messages})
            assert reply.json()["error"]["param"] == "messages"
            assert await server.is_serving()

    asyncio.run(body())


def test_what_waits_when_the_server_ends_is_told():
    async def body():
        async with serving() as server:
            first = await busy(server)
            second = asyncio.ensure_future(server.post("completions", COMPLETION))
            await waiting(server, 1)
            server.batcher.close(0)
            server.models.gate.set()
            replies = await asyncio.gather(first, second)
            assert {reply.status_code for reply in replies} <= {200, 503}
            assert replies[1].json()["error"]["code"] == "closing"
            assert (await server.post("completions", COMPLETION)).status_code == 503

    asyncio.run(body())
