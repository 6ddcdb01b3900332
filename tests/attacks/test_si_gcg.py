"""SI-GCG: what it adds to the search of GCG, with judges that are scripts."""

import jax
import numpy as np
import pytest

from fedsafe_jax.attacks import AttackError, Settings, gcg, si_gcg, suffix
from fedsafe_jax.attacks.contract import Score
from fedsafe_jax.data.examples import Example

REQUEST = Example((("system", "Be brief."), ("user", "Name a colour.")), "")
OTHER = Example((("user", "Name a city."),), "")
TARGET = "Sure, here is"
SETTINGS = Settings(
    steps=3, candidates=16, chunk=16, top_k=64, suffix_tokens=8, target_tokens=8, max_new_tokens=4
)


def judge(passes):
    """Scores by `passes(number of answers, place)`; None where it gives None."""

    def score(requests, answers):
        told = [passes(len(answers), i) for i in range(len(answers))]
        return [None if x is None else Score(float(x), bool(x)) for x in told]

    return score


def attack(lm, *judges, requests=(REQUEST,), **changes):
    settings = SETTINGS._replace(scores=tuple(map(judge, judges)), **changes)
    return si_gcg.attack([lm], requests, [[TARGET]] * len(requests), settings, jax.random.key(0))


def restated_search(lm):
    allowed = suffix.allowed_tokens(lm.tokenizer, lm.config.vocab_size)
    target = si_gcg.restated(REQUEST, TARGET)
    assert target == "Sure, here is: Name a colour."
    return gcg.Search([lm], REQUEST, [target], settings=SETTINGS, allowed=allowed)


def test_without_success_it_is_gcg_under_the_restated_target(packaged):
    one = restated_search(packaged.on_one_device())
    trace = one.run(jax.random.fold_in(jax.random.key(0), 0))
    # Two judges have to agree, and an answer that cannot be judged is no success.
    for second, unjudged in ((lambda n, i: False, 0), (lambda n, i: None, 15)):
        attacked = attack(packaged, lambda n, i: True, second)
        np.testing.assert_array_equal(attacked.losses, np.asarray([trace], np.float32))
        assert attacked.prompts[0][0].messages == one.messages
        assert attacked.counts == {"pooled": 0, "ended": 0, "unjudged": unjudged}
        assert attacked.queries == one.queries + 15  # five answers a step


def test_the_first_success_is_held_whatever_its_loss(packaged):
    one = restated_search(packaged.on_one_device())
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 0), 0)
    candidates, scores = one.draw(key)
    third = int(np.argsort(scores, kind="stable")[2])
    # The third of five answers, and of ten samples the last two: too few for the pool.
    attacked = attack(packaged, lambda n, i: i == 2 if n == 5 else i > 7, steps=1)
    assert attacked.prompts[0][0].messages == one.messages_with(candidates[third])
    assert attacked.counts["pooled"] == 0
    # The next target is the one that was given: the loss is of that one.
    plain = gcg.Search(
        [packaged.on_one_device()],
        REQUEST,
        [TARGET],
        settings=SETTINGS,
        allowed=suffix.allowed_tokens(packaged.tokenizer, packaged.config.vocab_size),
    )
    expected = plain.score(candidates[third][None])[0]
    assert attacked.losses[0, 1] == pytest.approx(expected, abs=1e-5)


def test_later_requests_start_from_suffixes_that_worked_and_searches_end_early(packaged):
    attacked = attack(packaged, lambda n, i: True, requests=(REQUEST, OTHER))
    assert attacked.losses.shape == (2, 4)
    # A success under each of the two targets ends a search; nothing is searched behind it.
    assert attacked.counts["ended"] == 2
    assert (attacked.losses[:, 2] == attacked.losses[:, 3]).all()
    alone = attack(packaged, lambda n, i: True, requests=(OTHER,))
    assert attacked.losses[1, 0] < alone.losses[0, 0]
    assert 2 <= attacked.counts["pooled"] <= 4


def test_it_needs_judges(packaged):
    with pytest.raises(AttackError, match="'si_gcg' needs judges"):
        attack(packaged)
