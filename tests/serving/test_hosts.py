"""A server on loopback answers to its own names alone, so that no stranger's page can ask it."""

import asyncio

import pytest

pytest.importorskip("starlette")
pytest.importorskip("httpx")

from in_process import COMPLETION, serving  # noqa: E402

from fedsafe_jax.serving.hosts import allowed_hosts  # noqa: E402


def test_loopback_answers_to_its_names_others_to_any_unless_told():
    own = {"localhost", "127.0.0.1", "::1"}
    assert allowed_hosts("127.0.0.1") == allowed_hosts("localhost") == own
    assert allowed_hosts("127.0.0.2", ("my.Box",)) == own | {"127.0.0.2", "my.box"}
    assert allowed_hosts("0.0.0.0") == allowed_hosts("127.0.0.1", ("*",)) == frozenset()
    assert allowed_hosts("0.0.0.0", ("my.box",)) == own | {"0.0.0.0", "my.box"}


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("LocalHost", 200),
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("my.box:8000", 200),
        ("evil.example", 403),
        ("evil.example:8000", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example:8000", 403),
        ("[::1].evil.example", 403),
        ("[evil.example]", 403),
        ("", 403),
    ],
)
def test_other_names_are_refused_on_every_route(host, status):
    async def body():
        async with serving(hosts=allowed_hosts("127.0.0.1", ("my.box",))) as server:
            headers = {"host": host}
            for path in ("/v1/models", "/v1/models/ada"):
                reply = await server.client.get(path, headers=headers)
                assert reply.status_code == status
            reply = await server.post("completions", COMPLETION, headers=headers)
            assert reply.status_code == status
            if status == 403:
                error = reply.json()["error"]
                assert error["code"] == "host_not_allowed" and "--allow_host" in error["message"]

    asyncio.run(body())
