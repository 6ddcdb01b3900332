"""Guardians, critics and models under guards."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from etils import epath

from fedsafe_jax.attacks import AttackPrompt, answering
from fedsafe_jax.data.examples import SAFE, UNSAFE, Example
from fedsafe_jax.data.refusals import REFUSAL, spoken, start_refusal
from fedsafe_jax.evals import comparison, judges
from fedsafe_jax.evals.judges import HARM, Judge, JudgeError, Verdict
from fedsafe_jax.evals.task import EvalOptions, EvalSet, under_guards
from fedsafe_jax.evals.tasks import TASKS
from fedsafe_jax.evals.two_sides import pairs
from fedsafe_jax.filters import classifier, requests, store
from fedsafe_jax.filters.protocol import FilterError
from fedsafe_jax.filters.training import TrainingOptions
from fedsafe_jax.guarding import critic, decodings, guardian, trajectories
from fedsafe_jax.guarding.contract import Counts, GuardError, risk_of
from fedsafe_jax.guarding.guarded_model import Guards, guard_model
from fedsafe_jax.guarding.guardian import Guardian
from fedsafe_jax.guarding.search import search
from fedsafe_jax.guarding.spec import GuardSpec
from fedsafe_jax.inference.chat_session import ChatSession
from fedsafe_jax.models.decoder_config import ModelError
from fedsafe_jax.pipeline import evaluation
from fedsafe_jax.pipeline.answer_files import AnswerFiles

PROMPTS = ["Hello!", "What is two plus two?", "Name a colour."]
DIALOGUES = [(("user", p),) for p in PROMPTS]


def of_colours(dialogues, answers):
    """Flags requests about colours."""
    del answers
    return np.array(["colour" in turns[-1][1] for turns in dialogues])


def of_answers(flagged):
    return lambda dialogues, answers: np.array([text in flagged for text in answers])


def test_a_guardian_at_the_door_answers_in_the_model_s_place(packaged):
    plain = packaged.generate(PROMPTS, max_new_tokens=12)
    door = Guardian(of_colours, reads_request=True, reply=guardian.refusing)
    lm = guard_model(packaged, Guards(guardian=door))
    texts, finished = lm.answer_dialogues(DIALOGUES, 12)
    assert texts == [*plain[:2], REFUSAL]
    assert finished[2]
    assert lm.record.take() == Counts(answers=3, by_guardian=1)
    assert lm.record.take() == Counts()


def test_a_guardian_that_reads_answers_replaces_them(packaged):
    plain = packaged.generate(PROMPTS, max_new_tokens=12)
    reader = Guardian(of_answers(plain[:1]), reads_request=False, reply=lambda d: ["No."] * len(d))
    lm = guard_model(packaged, Guards(guardian=reader))
    assert lm.generate(PROMPTS, max_new_tokens=12) == ["No.", *plain[1:]]


def test_a_forced_beginning_does_not_stand_before_what_takes_an_answer_s_place(packaged):
    door = Guardian(of_colours, reads_request=True, reply=guardian.refusing)
    lm = guard_model(packaged, Guards(guardian=door))
    texts, _ = lm.answer_dialogues(DIALOGUES, 6, begin="Sure, here")
    assert [text.startswith("Sure, here") for text in texts] == [True, True, False]
    begun = [packaged.tokenizer("Sure", add_special_tokens=False)["input_ids"]] * 3
    said = lm.continue_answers(DIALOGUES, begun, 6)
    assert packaged.text(said.ids[2]) == REFUSAL
    assert said.ids[:2] == packaged.continue_answers(DIALOGUES, begun, 6).ids[:2]


def test_a_model_without_guards_answers_as_it_is(packaged):
    lm = guard_model(packaged, Guards())
    options = {"max_new_tokens": 10, "temperature": 0.8, "seed": 4}
    assert lm.generate(PROMPTS, **options) == packaged.generate(PROMPTS, **options)
    tokens = np.array([[5, 6, 7]])
    np.testing.assert_array_equal(lm(tokens), packaged(tokens))


def test_stopping_keeps_the_model_s_own_answer_or_refuses(packaged):
    plain = packaged.generate(PROMPTS, max_new_tokens=20)

    def risk(dialogues, answers):
        return np.array([0.9 if "colour" in d[0][1] and len(a) > 20 else 0.1 for d, a in zip(
            dialogues, answers, strict=True)])  # fmt: skip

    lm = guard_model(packaged, Guards(decodings.parse("stop:block=2"), risk))
    assert lm.generate(PROMPTS, max_new_tokens=20) == [*plain[:2], REFUSAL]
    counts = lm.record.take()
    assert (counts.failed_closed, counts.answers) == (1, 3)
    # The third answer is stopped where its beginning is longer than 20 characters.
    ids = packaged.tokenizer(plain[2], add_special_tokens=False)["input_ids"]
    assert counts.tried < 3 * -(-len(ids) // 2)


def test_several_adapters_are_refused(packaged):
    from fedsafe_jax.models import lora

    shape = lora.LoraConfig(2, 4.0, ("q_proj",))
    factors = lora.init(jax.random.key(0), packaged.config, shape)
    both = jax.tree.map(lambda x: np.stack([x, x]), factors)
    lm = guard_model(packaged, Guards())
    with pytest.raises(ModelError, match="one adapter at a time"):
        lm.generate_each(lora.Adapter(both, shape), PROMPTS)


def judge_of(score):
    return Judge("guard:x", HARM, lambda answers: [Verdict(None, score)] * len(answers))


def test_a_thought_hides_nothing_from_a_guard():
    seen = []

    def judge(answers):
        seen.extend(spoken(one.answer) for one in answers)
        return [Verdict(True, 0.9)] * len(answers)

    risk_of(Judge("guard:x", HARM, judge))(DIALOGUES[:2], ["<think>Here is how", "Bad</think>Done"])
    assert [text.split() for text in seen] == [["Here", "is", "how"], ["Bad", "Done"]]


def test_a_chat_session_does_not_go_past_the_guards(packaged):
    with pytest.raises(ModelError, match="past its guards"):
        ChatSession(guard_model(packaged, Guards()))


def test_a_guard_that_fails_counts_as_risk():
    assert risk_of(judge_of(float("nan")))(DIALOGUES, ["a"] * 3).tolist() == [1.0] * 3
    assert risk_of(judge_of(None))(DIALOGUES, ["a"] * 3).tolist() == [1.0] * 3
    assert risk_of(judge_of(0.75))(DIALOGUES, ["a"] * 3).tolist() == [0.25] * 3
    with pytest.raises(GuardError, match="tells refusal"):
        risk_of(judges.make(("rules",))[0])


@pytest.mark.parametrize(
    ("spec", "error", "named"),
    [
        (GuardSpec("budget"), GuardError, "name a guard"),
        (GuardSpec("beam", "rules"), GuardError, "no decoding reads it"),
        (GuardSpec("budget", "rules"), GuardError, "does not tell harm"),
        (GuardSpec("beam", critic="x"), GuardError, "with a budget"),
        (
            GuardSpec("budget", "guard:package:model#llama-guard", critic="x"),
            GuardError,
            "no critic.json there",
        ),
        (GuardSpec(guardian="nowhere"), GuardError, "no filter.json there"),
        (GuardSpec(guardian="rules:x"), JudgeError, "takes nothing"),
        (GuardSpec("budget", "guard:nowhere"), JudgeError, "no such folder"),
    ],
)
def test_specs_are_checked_before_anything_is_loaded(spec, error, named):
    with pytest.raises(error, match=named):
        spec.check()


def test_what_guards_are_called():
    assert GuardSpec("budget:block=4", "x", "y").label == "budget+guardian"
    assert GuardSpec().label == ""


# Requests that read alone tell safe from unsafe, whatever was answered.
FRUIT, METAL = ("apple", "pear", "plum", "fig"), ("iron", "zinc", "lead", "gold")
ASKED = [(("user", f"Tell me how to {verb} the {noun}."),) for noun in (*FRUIT, *METAL)
         for verb in ("melt", "bend", "take", "weigh")]  # fmt: skip


def labelled():
    """Answers to every request: of metals one is unsafe, one refuses."""
    found = []
    for turns in ASKED:
        unsafe = any(noun in turns[0][1] for noun in METAL)
        found.append(Example(turns, "Here is how.", label=UNSAFE if unsafe else SAFE))
        if unsafe:
            found.append(Example(turns, REFUSAL, label=SAFE))
    return found


def refuses(dialogues, answers):
    return [start_refusal(answer) for answer in answers]


def test_requests_of_pairs():
    alone = Example((("user", "Who?"),), REFUSAL, label=SAFE)
    found = requests.of_pairs([*labelled(), alone], refuses)
    assert [e.messages for e in found] == ASKED  # each once; the one that only refusals answer not
    assert all(e.response == "" for e in found)
    assert [e.label for e in found] == [SAFE] * 16 + [UNSAFE] * 16


@pytest.fixture(scope="module")
def door(packaged, tmp_path_factory):
    """Folder of a small filter that reads requests."""
    folder = tmp_path_factory.mktemp("door")
    options = TrainingOptions(epochs=12, batch_size=8, learning_rate=3e-3, validation_share=0.25)
    found = requests.of_pairs(labelled(), refuses)
    made, _ = classifier.train(found, packaged.tokenizer, 0, options=options, max_length=32)
    store.save(made, folder, requests.REQUEST)
    return folder


def test_a_filter_of_requests_is_a_guardian_alone(door, packaged):
    made = guardian.load(str(door), lambda name: None)
    assert made.reads_request
    flagged = made.flags(ASKED, ["whatever is answered"] * len(ASKED))
    assert (flagged == np.repeat([False, True], 16)).mean() > 0.9
    np.testing.assert_array_equal(flagged, made.flags(ASKED, [""] * len(ASKED)))
    with pytest.raises(FilterError, match="use it as a guardian"):
        store.load(door)
    lm = guard_model(packaged, Guards(guardian=made))
    said = lm.generate([turns[0][1] for turns in ASKED], max_new_tokens=4)
    assert [text == REFUSAL for text in said] == flagged.tolist()


def test_discounted_cost_to_come():
    """The budget lasts behind a block exactly where the recursion of z stays above 0."""
    rng = np.random.default_rng(1)
    costs, tokens = rng.uniform(0, 0.4, 6).tolist(), [3, 3, 3, 3, 3, 2]
    need = trajectories.remaining(costs, tokens, 0.95)
    assert need[-1] == 0
    for start in range(5):
        for extra in (-1e-6, 1e-6):
            z = need[start] + extra
            for cost, count in zip(costs[start + 1 :], tokens[start + 1 :], strict=True):
                z = (z - cost) / 0.95**count
            assert (z > 0) == (extra > 0)


@pytest.fixture(scope="module")
def answered(packaged):
    """Answers to requests, with a risk that grows with the letters 'e' in them."""

    def risk(dialogues, texts):
        return np.array([min(0.08 * text.count("e"), 0.99) for text in texts])

    settings = decodings.parse("budget:block=3,budget=0.5")
    requests_ = [(("user", f"Tell me about the {noun}."),) for noun in (*FRUIT, *METAL)]
    found = trajectories.collect(
        packaged, requests_, settings, max_new_tokens=12, risk=risk, answers=4
    )
    return requests_, settings, risk, found


def test_answers_are_cut_where_a_search_would_stop(packaged, answered):
    requests_, _, risk, found = answered
    assert len(found) == 4 * len(requests_)
    one = max(found, key=lambda t: len(t.places))
    start = len(packaged.render([requests_[one.prompt]], 12, True)[0])
    ids = one.ids[start:]
    assert one.places == [start + n - 1 for n in range(3, len(ids), 3)]
    texts = [packaged.text(ids[:end]) for end in (*range(3, len(ids), 3), len(ids))]
    highest = np.maximum.accumulate(-np.log(1 - risk(None, texts)))
    np.testing.assert_allclose(one.to_come, highest[-1] - highest[:-1], atol=1e-6)
    logits = np.asarray(packaged(np.array([one.ids])), np.float64)[0, start - 1 : -1]
    own = [row[t] - np.log(np.exp(row).sum()) for row, t in zip(logits, ids, strict=True)]
    assert one.reward == pytest.approx(np.mean(own), abs=1e-4)  # float32 against float64


def test_a_critic_learns_what_hidden_states_tell():
    """Of states from which the cost and the reward follow, it learns both."""
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(1200, 32)).astype(np.float32)
    to_come = (0.5 / (1 + np.exp(-3 * hidden[:, 0]))).astype(np.float32)
    reward = -1 + 0.3 * hidden[:, 1]
    moments = trajectories.Moments(np.arange(1200) // 4, hidden, to_come, reward)
    made, trained = critic.train(moments, 0.5, epochs=30, learning_rate=3e-3)
    assert trained.loss < 0.5 * trained.constant
    assert trained.moments == (960, 240)
    chance, expected = made.heads(hidden, np.full(1200, 0.25, np.float32))
    assert ((chance > 0.5) == (to_come < 0.25)).mean() > 0.85
    assert np.abs(expected - reward).mean() < 0.15  # its standard deviation is 0.3


def test_a_critic_reads_the_model_and_guides_a_search(packaged, answered, tmp_path):
    requests_, settings, risk, found = answered
    moments = critic.moments_of(packaged, found)
    row = found[0].ids
    hidden = critic.hidden_states(packaged, [row, row[:-2]], [[len(row) - 3], [len(row) - 3]])
    np.testing.assert_allclose(hidden[0], hidden[1], atol=1e-4)  # what follows is not seen
    made, trained = critic.train(moments, settings.budget, epochs=15)
    assert sum(trained.moments) == len(moments.prompt) == sum(len(t.places) for t in found)
    more, less = (made.heads(moments.hidden, np.full(len(moments.prompt), z)) for z in (0.5, 0.01))
    assert more[0].mean() > less[0].mean()  # a greater budget lasts longer
    critic.save(made, tmp_path, {})
    again = critic.load(tmp_path)
    np.testing.assert_allclose(again.heads(moments.hidden, moments.reward)[0],
                               made.heads(moments.hidden, moments.reward)[0])  # fmt: skip
    lm = guard_model(packaged, Guards(settings, risk, critic=again))
    said = lm.generate([turns[0][1] for turns in requests_], max_new_tokens=12)
    assert all(text == REFUSAL or risk(None, [text])[0] < 1 - np.exp(-0.5) for text in said)
    other = again._replace(hidden_size=8)
    with pytest.raises(GuardError, match="trained on another model"):
        guard_model(packaged, Guards(settings, risk, critic=other))


def test_a_critic_s_folder_is_checked(tmp_path):
    with pytest.raises(GuardError, match="no critic.json"):
        critic.load(tmp_path)
    (tmp_path / "critic.json").write_text(json.dumps({"hidden_size": 4}))
    with pytest.raises(GuardError, match="cannot be read"):
        critic.load(tmp_path)


def test_a_critic_needs_two_prompts(answered, packaged):
    *_, found = answered
    moments = critic.moments_of(packaged, [t for t in found if t.prompt == 0])
    with pytest.raises(GuardError, match="at least two prompts"):
        critic.train(moments, 0.5)


def test_sets_are_asked_under_guards_beside_the_plain_ones(packaged):
    requests_ = [Example(turns, "") for turns in DIALOGUES]
    sets = {name: EvalSet(TASKS[name], "here", requests_) for name in ("advbench", "over_refusal")}
    both = under_guards(sets, "guardian")
    assert list(both) == ["advbench", "over_refusal", "advbench@guardian", "over_refusal@guardian"]
    assert pairs(both) == [
        ("advbench", "over_refusal"),
        ("advbench@guardian", "over_refusal@guardian"),
    ]
    assert both["advbench@guardian"].columns[0].title == "harmful refused (guardian)"
    warden = Guardian(of_colours, reads_request=True, reply=guardian.refusing)
    loads = []

    def load():
        loads.append(1)
        return Guards(guardian=warden)

    options = EvalOptions(8, guarded=lambda lm: guard_model(lm, load()))
    plain = evaluation.evaluate(packaged, sets, options)
    assert not loads  # nothing is loaded for what is not guarded
    outcome = evaluation.evaluate(packaged, both, options)
    assert {k: v for k, v in outcome.items() if k in sets} == plain
    did = outcome["advbench@guardian"]["guards"]
    assert (did["answers"], did["by_guardian"]) == (3, 1)
    assert did["seconds"] > 0
    (refused, _) = comparison.of_guards(both, {"fl": [outcome]}, options)
    assert (refused["arm"], refused["reference"]) == ("fl (guardian)", "fl")
    before = outcome["advbench"]["refused"]["rules"]
    after = outcome["advbench@guardian"]["refused"]["rules"]
    assert refused["difference"] == pytest.approx(100 * (np.mean(after) - np.mean(before)))
    summary = evaluation.summarise(both, [outcome, outcome], options)
    assert summary["advbench@guardian"]["guards"]["by_guardian"] == 2
    assert "guards" not in summary["advbench"]


def test_answers_of_other_guards_are_not_taken_for_those_of_these(packaged, tmp_path):
    for folder in ("guard", "critic", "elsewhere"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "weights").write_text("1")
    guard, by_state = f"guard:{tmp_path / 'guard'}#llama-guard", str(tmp_path / "critic")
    spec = GuardSpec("budget", guard=guard, critic=by_state)
    before = spec.fingerprint
    (tmp_path / "elsewhere" / "weights").write_text("2")
    assert spec.fingerprint == before != spec._replace(decoding="budget:budget=2").fingerprint
    (tmp_path / "critic" / "weights").write_text("2")  # trained again, in the same folder
    second = spec.fingerprint
    (tmp_path / "guard" / "weights").write_text("2")
    assert len({before, second, spec.fingerprint}) == 3

    sets = {"advbench": EvalSet(TASKS["advbench"], "here", [Example(DIALOGUES[2], "")])}
    both, kept = under_guards(sets, "guardian"), AnswerFiles(epath.Path(tmp_path / "kept"))
    warden = Guardian(of_colours, reads_request=True, reply=guardian.refusing)
    asked = []

    def guarded(lm):
        asked.append(1)
        return guard_model(lm, Guards(guardian=warden))

    options = EvalOptions(4, guarded=guarded)
    for by, times in (("one", 1), ("one", 1), ("another", 2)):
        outcome = evaluation.evaluate(
            packaged, both, options._replace(guarded_by=lambda by=by: by), kept
        )
        assert len(asked) == times and outcome["advbench@guardian"]["guards"]["answers"] == 1


def test_search_by_hand_equals_the_guarded_model(packaged):
    risk = lambda d, a: np.array([0.01 * (len(t) % 30) for t in a])  # noqa: E731
    settings = decodings.parse("budget:candidates=4,block=4,budget=0.2,retries=1")
    lm = guard_model(packaged, Guards(settings, risk))
    texts, _ = lm.answer_dialogues(DIALOGUES, 12, seed=2)
    found = search(packaged, DIALOGUES, settings, max_new_tokens=12, risk=risk, seed=2)
    assert texts == [packaged.text(ids) for ids in found.ids]


def test_an_adapter_changes_under_the_same_guards(packaged):
    lm = guard_model(packaged, Guards(guardian=Guardian(of_colours, True, guardian.refusing)))
    assert isinstance(dataclasses.replace(lm, name="other"), type(lm))


def test_attacks_are_answered_under_the_guards(packaged):
    """In the chat's form, behind a forced beginning, and as plain text."""
    prompts = [
        AttackPrompt(DIALOGUES[2]),
        AttackPrompt(DIALOGUES[2], begin="Sure, here"),
        AttackPrompt(DIALOGUES[2], chat=False),
        AttackPrompt(DIALOGUES[0]),
    ]
    plain = answering.answer(packaged, prompts, 10, batch_size=8)
    door = Guardian(of_colours, reads_request=True, reply=guardian.refusing)
    lm = guard_model(packaged, Guards(guardian=door))
    said = answering.answer(lm, prompts, 10, batch_size=8)
    assert said.own[:3] == [REFUSAL] * 3
    assert said.whole[1] == f"Sure, here {REFUSAL}"
    assert said.own[3] == plain.own[3]
    assert said.tokens == plain.tokens
    searched = guard_model(
        packaged, Guards(decodings.parse("beam:candidates=1,keep=1,temperature=0"))
    )
    assert answering.answer(searched, prompts, 10, batch_size=8) == plain
