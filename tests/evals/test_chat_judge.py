"""Chat judges: several answers at once, what is asked again, what is kept on disk."""

import hashlib
import json
import stat

import pytest
from chat_server import DROP, SLEEP, Server

from fedsafe_jax.evals import judges
from fedsafe_jax.evals.judges import FAILED, Answered, JudgeError, Tools, chat, endpoint
from fedsafe_jax.evals.judges.xstest_rubric import CLASSES
from fedsafe_jax.whole_files import StorageError


@pytest.fixture()
def serve(monkeypatch):
    """Starts servers; waits between two tries become numbers."""
    servers, waits = [], []

    def start(reply, seconds=0.0):
        servers.append(Server(reply, seconds))
        return servers[-1]

    start.waits = waits
    monkeypatch.setattr(endpoint.time, "sleep", waits.append)
    yield start
    for server in servers:
        server.close()


def answers(count: int) -> list[Answered]:
    return [Answered((("user", f"request {i}."),), f"answer {i}.") for i in range(count)]


def number(text: str) -> int:
    """The number of the answer that a wording quotes."""
    return int(text.split("answer ")[-1].split(".")[0])


def by_number(text: str, count: int) -> str:
    return list(CLASSES)[number(text) % 3]


def judged(spec, asked, **tools):
    (judge,) = judges.make((spec,), Tools(**tools))
    return judge.judge(asked)


def test_verdicts_are_in_order_whatever_ends_first(serve):
    def reply(text, count):
        SLEEP(0.01 * (7 - number(text) % 8))
        return by_number(text, count)

    server = serve(reply)
    verdicts = judged(server.spec, answers(24))
    assert [v.label[0] for v in verdicts] == ["1", "2", "3"] * 8
    assert [v.refused for v in verdicts] == [False, True, True] * 8
    assert 1 < server.most <= 8 and server.requests == 24


@pytest.mark.parametrize("concurrent", [1, 3])
def test_no_more_at_once_than_asked_for(serve, concurrent):
    server = serve(by_number, seconds=0.02)
    judged(server.spec, answers(12), concurrent=concurrent)
    assert server.most == concurrent


@pytest.mark.parametrize("passing", [429, 503, DROP, None, "", "<think>So", b"junk"])
def test_what_may_pass_is_asked_again(serve, passing):
    server = serve(lambda text, count: passing if count < 3 else by_number(text, count))
    verdicts = judged(server.spec, answers(3))
    assert [v.label[0] for v in verdicts] == ["1", "2", "3"] and server.requests == 9
    assert sorted(serve.waits) == [0.0] * 3 + [1.0] * 3 + [2.0] * 3


@pytest.mark.parametrize("nothing", [None, "", "  ", "I cannot judge that."])
def test_a_reply_that_says_nothing_fails_alone_and_is_not_kept(serve, tmp_path, nothing):
    def reply(text, count):
        return nothing if number(text) < 5 else by_number(text, count)

    server = serve(reply)
    verdicts = judged(server.spec, answers(7), cache=str(tmp_path))
    assert verdicts[:5] == [FAILED] * 5 and all(v.score is not None for v in verdicts[5:])
    assert len([*tmp_path.glob("*/*.json")]) == 2


@pytest.mark.parametrize(("status", "problem"), [(401, "not accepted"), (DROP, "3 times")])
def test_an_endpoint_that_fails_is_given_up(serve, status, problem):
    server = serve(lambda text, count: status)
    verdicts = judged(server.spec, answers(200))
    assert len(verdicts) == 200
    assert all(v.score is None and problem in v.problem for v in verdicts)
    tries = 1 if status == 401 else 3
    assert server.requests <= (chat.GIVE_UP + 2 * 8) * tries


def test_one_that_is_busy_is_asked_one_at_a_time(serve):
    """More than two at once are refused, as often as they are tried."""
    server = serve(lambda text, count: 429 if server.at_once > 2 else by_number(text, count), 0.01)
    verdicts = judged(server.spec, answers(40))
    assert [v.label[0] for v in verdicts] == (["1", "2", "3"] * 14)[:40]
    assert not any(v.problem for v in verdicts)


def test_kept_replies_are_not_asked_for_again(serve, tmp_path):
    server = serve(by_number)
    first = judged(server.spec, answers(5), cache=str(tmp_path), api_key="sk-planted")
    assert judged(server.spec, answers(6), cache=str(tmp_path))[:5] == first
    assert server.requests == 6
    files = [*tmp_path.glob("*/*.json")]
    assert len(files) == 6
    for file in files:
        kept = json.loads(file.read_text())
        assert set(kept) == {"model", "host", "rubric", "version", "messages", "reply"}
        assert "sk-planted" not in file.read_text()
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        reply = kept.pop("reply")
        asked = json.dumps(kept, sort_keys=True).encode()
        assert reply and file.stem == hashlib.sha256(asked).hexdigest()
    other = server.spec.replace("chat:m@", "chat:n@")
    judged(other, answers(2), cache=str(tmp_path))
    assert server.requests == 8


def test_the_same_answer_twice_is_one_file(serve, tmp_path):
    server = serve(by_number)
    verdicts = judged(server.spec, answers(1) * 16, cache=str(tmp_path))
    assert len(set(verdicts)) == 1 and len([*tmp_path.glob("*/*.json")]) == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: b"[]",
        lambda content: b"\xff\xfe",
        lambda content: content.replace(b"request 0", b"request 9"),
        lambda content: content.replace(b'"reply": "1_full_compliance"', b'"reply": 5'),
    ],
)
def test_a_damaged_reply_is_set_aside_and_asked_for_again(serve, tmp_path, damage):
    server = serve(by_number)
    first = judged(server.spec, answers(1), cache=str(tmp_path))
    (file,) = tmp_path.glob("*/*.json")
    content = file.read_bytes()
    file.write_bytes(damage(content))
    assert judged(server.spec, answers(1), cache=str(tmp_path)) == first
    assert server.requests == 2 and file.read_bytes() == content
    assert file.with_name(f"{file.name}.damaged").read_bytes() == damage(content)


def test_a_cache_that_cannot_be_written_is_one_line(serve, tmp_path):
    (tmp_path / "file").write_text("")
    server = serve(by_number)
    with pytest.raises((StorageError, ValueError, RuntimeError), match="file") as error:
        judged(server.spec, answers(3), cache=str(tmp_path / "file"))
    assert "\n" not in str(error.value)


def test_without_the_client_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(chat.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(JudgeError, match=r"openai client; pip install -e .\[judge\]") as error:
        judges.parse("chat:m@https://a/v1#xstest")
    assert "\n" not in str(error.value)
