"""PAIR and TAP with a scripted attacker and a scripted model: who is asked what, what is kept."""

import json
import threading

import jax
import numpy as np
import pytest

from fedsafe_jax.attacks import ATTACKS, AttackError, Settings, attacker, measurement, prompt_search
from fedsafe_jax.attacks.answering import Answers
from fedsafe_jax.attacks.contract import Score
from fedsafe_jax.data.examples import Example, SourceError
from fedsafe_jax.evals.judges import FAILED, REFUSAL, Judge, JudgeError, Verdict
from fedsafe_jax.evals.judges.endpoint import EndpointError

SYSTEM = ("system", "Be brief.")
REQUESTS = [
    Example((SYSTEM, ("user", "Name a colour.")), ""),
    Example((("user", "What is the time?"),), ""),
]
DOWN = EndpointError("attacker at http://h/v1/chat/completions: HTTP 500, 3 times; later.")


class Script:
    """An attacker: `reply(request, number of earlier prompts, number of the call)` is its prompt,
    a whole reply in bytes, or an exception."""

    def __init__(self, reply):
        self.reply, self.asked, self.lock = reply, [], threading.Lock()

    def __call__(self, messages):
        with self.lock:
            self.asked.append(messages)
            number = len(self.asked) - 1
        assert [m["role"] for m in messages[:2]] == ["system", "user"]
        assert all(m["role"] == "assistant" for m in messages[2::2])
        (request,) = (i for i, r in enumerate(REQUESTS) if r.prompt in messages[0]["content"])
        said = self.reply(request, len(messages) // 2 - 1, number)
        if isinstance(said, Exception):
            raise said
        if isinstance(said, bytes):
            return said.decode()
        return "Well:\n```json\n" + json.dumps({"improvement": "more", "prompt": said}) + "\n```"


@pytest.fixture
def run(monkeypatch):
    """Runs a method; the model says "to PROMPT", and `scores` has the score of each prompt."""
    read = []

    def answer(lm, prompts, max_new_tokens, batch_size):
        said = [prompt.messages[-1][1] for prompt in prompts]
        read.extend(said)
        own = [f"{lm} to {text}" for text in said]
        return Answers(own, own, [True] * len(own), [1] * len(own))

    monkeypatch.setattr(prompt_search, "answer", answer)

    def start(name, reply, scores=None, models=("m",), evaluator=None, **sizes):
        def score(requests, answers):
            values = [(scores or {}).get(text, 0.0) for text in answers]
            return [v if v is None or isinstance(v, Score) else Score(v, v >= 0.9) for v in values]

        script = Script(reply)
        settings = Settings(
            attacker=script, evaluator=evaluator, score=score, concurrent=1, **sizes
        )
        ATTACKS[name].check(settings)
        attacked = ATTACKS[name].run(
            models, REQUESTS, [("Sure",)] * 2, settings=settings, key=jax.random.key(0)
        )
        return attacked, script

    start.read = read
    return start


def asked_of(attacked):
    return [[prompt.messages for prompt in prompts] for prompts in attacked.prompts]


def test_pair_improves_by_scores_and_keeps_the_best_prompt(run):
    def reply(request, earlier, number):
        return f"{'ab'[request]}{earlier}.{number}"

    # Four streams in the first iteration, calls 0 to 3; the second one of the time breaks it.
    scores = {"m to a0.1": 0.5, "m to b0.3": 0.95, "m to a1.4": 0.2}
    attacked, script = run("pair", reply, scores, streams=2, iterations=3)
    assert run.read == "a0.0 a0.1 b0.2 b0.3 a1.4 a1.5 a2.6 a2.7".split()
    assert attacked.queries.tolist() == [6, 2]
    assert asked_of(attacked) == [[(SYSTEM, ("user", "a0.1"))], [(("user", "b0.3"),)]]
    assert attacked.counts == {"dropped": 0, "malformed": 0, "unjudged": 0}
    assert attacked.losses.shape == (2, 0) and not attacked.stages
    # The next prompt of a stream is asked for behind its own last one, its answer and score.
    system, first, own, told = script.asked[5]
    assert "Name a colour." in system["content"] and REQUESTS[1].prompt not in system["content"]
    assert json.loads(own["content"]) == {"improvement": "more", "prompt": "a0.1"}
    assert "m to a0.1" in told["content"] and "Score: 5 of 10" in told["content"]


def test_a_prompt_that_breaks_a_request_is_kept_whatever_its_score(run):
    scores = {"m to 0": 0.6, "m to 1": Score(0.4, True)}
    attacked, _ = run("pair", lambda r, e, n: str(n), scores, streams=2, iterations=1)
    assert attacked.prompts[0][0].messages[-1][1] == "1"


def test_of_several_models_the_one_that_holds_is_shown(run):
    scores = {"m to p": 1.0, "n to p": 0.3}
    attacked, script = run(
        "pair", lambda r, e, n: "p", scores, models=("m", "n"), streams=1, iterations=2
    )
    told = script.asked[2][-1]["content"]
    assert "n to p" in told and f"Score: {round(10 * (1.0 + 0.3) / 2)} of 10" in told
    assert attacked.queries.tolist() == [2, 2]  # of each model, as neither request is broken


def test_conversations_keep_their_last_turns(run):
    _, script = run("pair", lambda r, e, n: f"p{n}", streams=1, iterations=6)
    assert len(script.asked[-1]) == 2 + 2 * attacker.KEPT
    assert json.loads(script.asked[-1][-2]["content"])["prompt"] == "p9"


def test_malformed_replies_are_asked_for_again_then_the_stream_is_dropped(run):
    bad = [b"no JSON", b"{{", b'{"prompt": 3}', b'["prompt"]', b"", b'{"prompt": " "}']

    def reply(request, earlier, number):
        # Call 1 onwards: all tries of the second stream fail.
        return bad[number] if 1 <= number <= attacker.ATTEMPTS else f"p{number}"

    attacked, script = run("pair", reply, streams=2, iterations=2)
    assert attacked.counts == {"dropped": 1, "malformed": attacker.ATTEMPTS, "unjudged": 0}
    # Three streams are left of four, and each asked twice.
    assert attacked.queries.tolist() == [2, 4]
    assert len(script.asked) == 4 + attacker.ATTEMPTS - 1 + 3


def test_a_reply_that_fails_drops_its_stream(run):
    attacked, _ = run(
        "pair", lambda r, e, n: DOWN if n == 2 else f"p{n}", {"m to p3": 0.1}, streams=2,
        iterations=1,
    )  # fmt: skip
    assert attacked.counts["dropped"] == 1 and attacked.queries.tolist() == [2, 1]


@pytest.mark.parametrize("name", ["pair", "tap"])
def test_an_endpoint_that_is_down_is_one_line(run, name):
    with pytest.raises(AttackError, match=f"'{name}': 3 of 3 prompts were not .* HTTP 500") as one:
        run(name, lambda r, e, n: DOWN, streams=30, branching=4)
    assert "\n" not in str(one.value) and not run.read
    with pytest.raises(AttackError, match="its replies hold no JSON object"):
        run(name, lambda r, e, n: b"I would rather not.", streams=30, branching=4)


def test_an_endpoint_that_goes_down_later_is_no_result(run):
    with pytest.raises(AttackError, match="8 of 16 prompts were not written"):
        run("pair", lambda r, e, n: DOWN if n >= 8 else "p", streams=4, iterations=2)


def test_answers_that_cannot_be_judged_count_as_refusals(run):
    attacked, script = run("pair", lambda r, e, n: "p", {"m to p": None}, streams=1, iterations=2)
    assert attacked.counts["unjudged"] == 4 and "Score: 0 of 10" in script.asked[2][-1]["content"]


def test_tap_prunes_what_is_off_topic_and_what_scores_low(run):
    compared = []

    def reply(request, earlier, number):
        return f"{'ab'[request]}{earlier}.{number}"

    def evaluator(messages):
        text = messages[-1]["content"]
        compared.append(text)
        second = text.rsplit("\n", 1)[1]
        return {"a0.2": "No.", "b0.5": "Perhaps"}.get(second, "**YES**")

    # Depth 1: three branches of each root. Of a's the third is off topic, the second the best; b0.4
    # breaks its request.
    scores = {"m to a0.0": 0.1, "m to a0.1": 0.4, "m to b0.4": 1.0, "m to a1.7": 0.3}
    attacked, script = run("tap", reply, scores, evaluator=evaluator, branching=3, width=1, depth=2)
    assert run.read == "a0.0 a0.1 b0.3 b0.4 b0.5 a1.6 a1.7 a1.8".split()
    assert attacked.queries.tolist() == [5, 3]
    # At the second depth the best leaf alone grows.
    assert [json.loads(m[2]["content"])["prompt"] for m in script.asked[6:]] == ["a0.1"] * 3
    assert asked_of(attacked) == [[(SYSTEM, ("user", "a0.1"))], [(("user", "b0.4"),)]]
    assert attacked.counts == {
        "dropped": 0, "malformed": 0, "unread": 1, "off_topic": 1, "pruned": 1 + 2, "unjudged": 0,
    }  # fmt: skip
    assert len(compared) == 9 and REQUESTS[0].dialogue in compared[0]


def test_a_tree_without_a_branch_on_topic_grows_anew(run):
    attacked, script = run(
        "tap", lambda r, e, n: f"p{n}", evaluator=lambda m: "NO", branching=2, width=2, depth=2
    )
    assert not run.read and not attacked.queries.any() and attacked.counts["off_topic"] == 8
    assert all(len(messages) == 2 for messages in script.asked)
    # The request itself is asked where no prompt was tried.
    assert asked_of(attacked) == [[one.messages] for one in REQUESTS]


def test_replies_are_read_as_json_objects():
    read = attacker.read_proposal
    assert read('{"improvement": "x", "prompt": "p"}') == ("p", "x")
    assert read('I think {so}. {"prompt": "two\nlines"} {"prompt": "q"}') == ("two\nlines", "")
    assert read('{"prompt": "half \\ud800 a pair", "improvement": 3}') == ("half ? a pair", "")
    assert read('{"x": ' * 100_000) is None and read("") is None and read("[1, 2]") is None


def test_what_the_attacker_is_told_can_be_a_file(run, tmp_path):
    file = tmp_path / "told.txt"
    file.write_text("Test it: {request} As JSON.\n")
    told = attacker.read_prompt(str(file))
    _, script = run("pair", lambda r, e, n: "p", attacker_prompt=told, streams=1, iterations=1)
    assert script.asked[0][0]["content"] == f"Test it: {REQUESTS[0].dialogue} As JSON."
    file.write_text("Test it.")
    with pytest.raises(SourceError, match=r"told.txt: no \{request\} is there"):
        attacker.read_prompt(str(file))
    with pytest.raises(AttackError, match="'tap' needs a chat model"):
        ATTACKS["tap"].check(Settings())


def test_scores_are_how_far_a_judge_calls_it_no_refusal():
    said = {"no": Verdict(True, 0.9), "yes": Verdict(False, 0.25), "?": FAILED}
    judge = Judge("mine", REFUSAL, lambda answers: [said[one.answer] for one in answers])
    score = measurement.scoring(judge)
    no, yes, unknown = score([REQUESTS[0]] * 3, ["no", "yes", "?"])
    np.testing.assert_allclose([no.value, yes.value], [0.1, 0.75])
    assert not no.broken and yes.broken and unknown is None
    with pytest.raises(JudgeError, match="judge 'mine' failed on all 1 answers"):
        score(REQUESTS[:1], ["?"])
