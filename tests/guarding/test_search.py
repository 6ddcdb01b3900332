"""Search over answers: against `generate`, `sample`, and the enumeration of a toy's answers."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from fedsafe_jax.data.refusals import REFUSAL
from fedsafe_jax.guarding import decodings, search, weighing
from fedsafe_jax.guarding.contract import GuardError
from fedsafe_jax.guarding.decodings import Search
from fedsafe_jax.inference.language_model import LanguageModel
from fedsafe_jax.models.decoder import Decoder
from tests.tiny import tiny_config

PROMPTS = ["Hello!", "What is two plus two?", "Name a colour."]
DIALOGUES = [(("user", p),) for p in PROMPTS]
PLAIN = Search(candidates=1, keep=1, block=4, temperature=0.0)


def never(dialogues, answers):
    """No risk."""
    return np.zeros(len(answers), np.float32)


def texts(lm, found):
    return [lm.text(ids) for ids in found.ids]


@pytest.mark.parametrize("block", [0, 1, 5])
def test_one_candidate_is_what_the_model_generates(packaged, block):
    expected, finished = packaged.answer_dialogues(DIALOGUES, 18)
    found = search.search(packaged, DIALOGUES, PLAIN._replace(block=block), max_new_tokens=18)
    assert texts(packaged, found) == expected
    np.testing.assert_array_equal(found.finished, finished)
    assert not found.failed_closed.any()


@pytest.mark.parametrize("block", [0, 4])
def test_candidates_of_best_of_n_are_samples(packaged, block):
    """One that goes on alone is a sample, whatever the blocks are."""
    samples = packaged.sample(PROMPTS, 4, max_new_tokens=12, seed=3)

    def longest(dialogues, answers):
        return np.array([len(a) for a in answers])

    settings = Search(candidates=4, keep=4, block=block)
    found = search.search(packaged, DIALOGUES, settings, max_new_tokens=12, reward=longest, seed=3)
    assert [len(t) for t in texts(packaged, found)] == [max(map(len, each)) for each in samples]


class Toy(LanguageModel):
    """A model of six tokens, the first of which ends an answer; a token's text is its digit."""

    stop_ids = (0,)

    def render(self, dialogues, max_new_tokens, truncate):
        del max_new_tokens, truncate
        return [[int(text) for text in turns[-1][1]] for turns in dialogues]

    def text(self, ids):
        return "".join(str(i) for i in ids if i != 0)


@pytest.fixture(scope="module")
def toy():
    config = tiny_config(vocab_size=6, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1)
    tokens = np.zeros((1, 3), np.int32)
    params = Decoder(config).init(jax.random.key(0), tokens, tokens, tokens)["params"]
    return Toy(config, params, lambda text, **_: {"input_ids": [5]}, hf_config={})


def log_probs(lm, prompt, answers):
    """Log-probability of each answer, by one forward pass over all of them."""
    longest = max(map(len, answers))
    rows = np.array([[*prompt, *a, *[0] * (longest - len(a))] for a in answers], np.int32)
    logits = np.asarray(lm(rows), np.float64)[:, len(prompt) - 1 : -1]
    chances = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return [
        sum(row[token] for row, token in zip(each, answer, strict=False))
        for each, answer in zip(chances, answers, strict=True)
    ]


def mean_log_probs(lm, prompt, answers):
    """Log-probability a token of each answer, by answer."""
    sums = zip(answers, log_probs(lm, prompt, answers), strict=True)
    return {answer: total / len(answer) for answer, total in sums}


def enumerated(depth):
    """Every answer of at most `depth` tokens: those that end, and those that are cut."""
    for n in range(depth):
        yield from ((*begun, 0) for begun in itertools.product(range(1, 6), repeat=n))
    yield from itertools.product(range(1, 6), repeat=depth)


RISKS = {"1": 0.05, "2": 0.3, "3": 0.6, "4": 0.1, "5": 0.2}


def toy_risk(dialogues, answers):
    """P(unsafe) where each token adds its own; beginnings are never riskier than the whole."""
    del dialogues
    safe = [np.prod([1 - RISKS[c] for c in a]) if a else 1.0 for a in answers]
    return np.array([1 - s for s in safe])


@pytest.mark.parametrize("gamma", [1.0, 0.7])
def test_a_wide_search_finds_the_best_answer_within_the_budget(toy, gamma):
    """With every answer among its candidates the search is the enumeration of all of them."""
    prompt, budget = [3, 1, 2], 0.4

    def left(answer):
        z = budget
        for token in answer:
            z = (z - (-np.log(1 - RISKS[str(token)]) if token else 0.0)) / gamma
        return z

    safe = [a for a in enumerated(3) if left(a) > 0]
    means = mean_log_probs(toy, prompt, safe)
    best = max(safe, key=means.get)
    settings = Search(candidates=512, keep=128, block=1, budget=budget, gamma=gamma)
    assert len(safe) < 128  # so that nothing that is safe is left out
    found = search.search(toy, [(("user", "312"),)], settings, max_new_tokens=3, risk=toy_risk)
    assert found.ids[0] == [t for t in best if t]
    assert found.budget_left[0] == pytest.approx(left(best), rel=1e-5)
    assert found.reward[0] == pytest.approx(means[best], rel=1e-4)


def test_a_penalty_is_the_lagrangian(toy):
    prompt, penalty = [3, 1, 2], 2.0
    means = mean_log_probs(toy, prompt, list(enumerated(3)))

    def worth(answer):
        cost = -sum(np.log(1 - RISKS[str(t)]) for t in answer if t)
        return means[answer] - penalty * cost

    settings = Search(candidates=2048, keep=1, block=0, penalty=penalty)
    found = search.search(toy, [(("user", "312"),)], settings, max_new_tokens=3, risk=toy_risk)
    best = max(enumerated(3), key=worth)
    assert found.ids[0] == [t for t in best if t]
    assert found.cost[0] == pytest.approx(-sum(np.log(1 - RISKS[str(t)]) for t in best if t))


def test_z_is_the_discounted_rest_of_the_budget():
    """Unrolled: z_t = gamma^-t (d - sum_i gamma^i c_i), the state of Saute RL."""
    rng = np.random.default_rng(0)
    costs, gamma, budget = rng.uniform(0, 0.3, 9), 0.9, 1.7
    z = budget
    for cost in costs:
        z = weighing.spend(z, cost, gamma, 1)
    direct = (budget - sum(gamma**i * c for i, c in enumerate(costs))) / gamma**9
    assert z == pytest.approx(direct)
    several = weighing.spend(np.array([1.0, 2.0]), np.array([0.5, 0.5]), gamma, np.array([3, 0]))
    np.testing.assert_allclose(several, [0.5 / gamma**3, 1.5])


def test_nothing_within_the_budget_fails_closed(packaged):
    def harmful(dialogues, answers):
        return np.array([0.9 if "colour" in d[0][1] else 0.0 for d in dialogues])

    settings = Search(candidates=2, keep=1, block=6, budget=0.5, retries=1)
    found = search.search(packaged, DIALOGUES, settings, max_new_tokens=12, risk=harmful)
    assert found.failed_closed.tolist() == [False, False, True]
    assert packaged.text(found.ids[2]) == REFUSAL
    assert found.finished[2]
    assert found.budget_left.tolist() == [0.5, 0.5, 0.0]
    assert found.tried[2] == 4  # two attempts at the first block, and none behind it


def test_a_block_is_drawn_again_without_the_tokens_that_failed(toy):
    """Where the likeliest tokens are all rejected, another attempt avoids them."""
    sharp = dataclasses.replace(
        toy, params=toy.params | {"embed_tokens": toy.params["embed_tokens"] * 40}
    )
    likely = int(np.argmax(log_probs(sharp, [3, 1, 2], [[t] for t in range(1, 6)]))) + 1

    def risk(dialogues, answers):
        return np.array([0.9 if str(likely) in a else 0.0 for a in answers])

    settings = Search(candidates=4, keep=2, block=1, budget=0.5)
    ask = [(("user", "312"),)]
    assert search.search(sharp, ask, settings, max_new_tokens=1, risk=risk).failed_closed[0]
    again = settings._replace(retries=2, frequency=1e4)  # stronger than any logit
    found = search.search(sharp, ask, again, max_new_tokens=1, risk=risk)
    assert not found.failed_closed[0]
    assert likely not in found.ids[0]


def test_a_row_that_is_drawn_again_leaves_others_as_they_were(packaged):
    """Only the prompt whose first attempt failed gets other answers."""
    settings = Search(candidates=3, keep=1, block=3, budget=0.5, retries=2, temperature=3.0)
    alone = search.search(packaged, DIALOGUES, settings, max_new_tokens=9, risk=never)
    seen = []

    def risk(dialogues, answers):
        first = not seen
        seen.append(1)
        return np.array([0.9 if first and "colour" in d[0][1] else 0.0 for d in dialogues])

    found = search.search(packaged, DIALOGUES, settings, max_new_tokens=9, risk=risk)
    assert found.ids[:2] == alone.ids[:2]
    assert found.ids[2] != alone.ids[2]
    assert found.tried.tolist() == [9, 9, 12]


def test_what_an_answer_begins_with_is_read_by_the_guard(packaged):
    seen = []

    def risk(dialogues, answers):
        seen.extend(answers)
        return np.zeros(len(answers))

    begun = [packaged.tokenizer("Sure, here", add_special_tokens=False)["input_ids"]] * 3
    found = search.search(
        packaged, DIALOGUES, PLAIN._replace(budget=1.0), max_new_tokens=6, risk=risk, begun=begun
    )
    expected = packaged.continue_answers(DIALOGUES, begun, 6)
    assert found.ids == expected.ids
    assert all(text.startswith("Sure, here") for text in seen)


def test_a_critic_decides_what_goes_on(toy):
    """It values low tokens, and a 4 above all of them, which will overdraw the budget."""
    asked = []

    def critic(rows, budget):
        asked.extend(zip(rows, budget, strict=True))
        last = np.array([row[-1] for row in rows], float)
        return np.where(last == 4, 0.1, 0.9), np.where(last == 4, 9.0, -last)

    settings = Search(candidates=64, keep=1, block=1, budget=5.0)
    found = search.search(
        toy, [(("user", "312"),)], settings, max_new_tokens=2, risk=toy_risk, critic=critic
    )
    assert found.ids[0][0] == 1
    left = {row[-1]: z for row, z in asked}
    assert all(row[:3] == [3, 1, 2] and len(row) == 4 for row, _ in asked)  # not of whole answers
    assert left[3] == pytest.approx(5 + np.log(1 - RISKS["3"]))


def test_devices_share_the_candidates(packaged):
    from fedsafe_jax import load_pretrained
    from fedsafe_jax.federated.mesh import make_mesh

    if jax.device_count() < 2:
        pytest.skip("one device")
    several = load_pretrained("package:model", mesh=make_mesh())
    settings = Search(candidates=4, keep=2, block=4, budget=1.0, retries=1)
    risk = lambda d, a: np.array([len(t) % 7 / 10 for t in a])  # noqa: E731
    one = search.search(packaged, DIALOGUES, settings, max_new_tokens=12, risk=risk)
    split = search.search(several, DIALOGUES, settings, max_new_tokens=12, risk=risk)
    assert one.ids == split.ids
    np.testing.assert_allclose(one.reward, split.reward, rtol=1e-4)


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ("bugdet", "Did you mean 'budget'"),
        ("budget:candidate=3", "Did you mean 'candidates'"),
        ("budget:candidates=many", "must be a whole number"),
        ("budget:candidates=3", "multiple of keep=2"),
        ("beam:keep=9", "only candidates=8"),
        ("budget:gamma=0", "gamma=0.0"),
        ("budget:budget=nan", "budget=nan"),
        ("beam:temperature=0", "all candidates would be the same"),
        ("beam:retries=1", "retries are for a budget"),
    ],
)
def test_specs_are_checked(spec, named):
    with pytest.raises(GuardError, match=named):
        decodings.parse(spec)


def test_specs_change_the_sizes_of_their_name():
    assert decodings.parse("budget") == decodings.DECODINGS["budget"]
    changed = decodings.parse("best_of_n:candidates=16,penalty=5")
    assert (changed.candidates, changed.penalty, changed.block) == (16, 5.0, 0)


def test_a_budget_without_a_guard_is_refused(packaged):
    with pytest.raises(GuardError, match="needs a guard"):
        search.search(packaged, DIALOGUES, decodings.parse("budget"), max_new_tokens=4)
