"""Preference losses against torch on the same logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cai_examples import Logits

from fedsafe_jax.cai import losses, steps, train
from fedsafe_jax.cai.losses import Ratios
from fedsafe_jax.config import default_config
from fedsafe_jax.data.chat import Encoded
from fedsafe_jax.validation import validate

VOCABULARY, SIZE, SEQ, BETA = 11, 3, 16, 0.3
NAMES = ("dpo", "ipo", "kto")


def some(rng, length, learned_from):
    ids = rng.integers(1, VOCABULARY, length).astype(np.int32)
    return Encoded(ids, np.arange(length) >= learned_from)


@pytest.fixture(scope="module")
def answers():
    """Two pairs and their mismatched answers of different lengths; the third place is filling."""
    rng = np.random.default_rng(0)
    lengths = [(5, 2), (7, 3), (6, 2), (4, 1), (5, 2), (6, 3), (7, 2), (4, 2)]
    return [some(rng, *length) for length in lengths]


def packed(answers):
    pairs = [(answers[0], answers[2]), (answers[1], answers[3])]
    others = [(answers[4], answers[6]), (answers[5], answers[7])]
    return steps.pack_pairs(pairs, others, SIZE, SEQ)


def torch_ratio(torch, policy, reference, answer, tokens_at):
    """Log-ratio of one answer, from the rows of logits that its tokens lie on."""
    total = 0
    for logits, sign in ((policy, 1), (reference, -1)):
        for place in np.flatnonzero(answer.loss_mask):
            row = logits[tokens_at[place - 1]]
            total = total + sign * torch.log_softmax(row, -1)[answer.ids[place]]
    return total


def torch_losses(torch, chosen, rejected, mismatched):
    """The papers' formulas, in torch."""
    margin = chosen - rejected
    point = torch.clamp(torch.stack(mismatched).mean(), min=0).detach()
    desirable = 1 - torch.sigmoid(BETA * (chosen - point))
    undesirable = 1 - torch.sigmoid(BETA * (point - rejected))
    return {
        "dpo": -torch.nn.functional.logsigmoid(BETA * margin).mean(),
        "ipo": ((margin - 1 / (2 * BETA)) ** 2).mean(),
        "kto": torch.cat([desirable, undesirable]).mean(),
    }


@pytest.mark.parametrize("name", NAMES)
def test_preference_losses_equal_torch_on_the_same_logits(answers, name):
    torch = pytest.importorskip("torch")
    data = packed(answers)
    rng = np.random.default_rng(1)
    shape = (*data.rows.tokens.shape, VOCABULARY)
    policy, reference = rng.normal(size=(2, *shape)).astype(np.float32)

    def loss(adapter):
        found = [
            train.log_likelihoods(Logits(), {"logits": reference}, a, data, 4 * SIZE)
            for a in (adapter, None)
        ]
        return train.preference_losses(found[0] - found[1], data.on, (name,), BETA)[name]

    value, grad = jax.value_and_grad(loss)({"logits": jnp.asarray(policy)})
    mine = torch.tensor(policy, dtype=torch.float64, requires_grad=True)
    fixed = torch.tensor(reference, dtype=torch.float64)
    number = [0, 1, SIZE, SIZE + 1, 2 * SIZE, 2 * SIZE + 1, 3 * SIZE, 3 * SIZE + 1]
    ratios = []
    for answer, owner in zip(answers, number, strict=True):
        where = [tuple(p) for p in np.argwhere(data.owner == owner)]
        assert len(where) == len(answer.ids)
        ratios.append(torch_ratio(torch, mine, fixed, answer, where))
    expected = torch_losses(
        torch, torch.stack(ratios[0:2]), torch.stack(ratios[2:4]), ratios[4:]
    )[name]  # fmt: skip
    expected.backward()
    # float32 sums of about ten terms of size one, against float64.
    assert float(value) == pytest.approx(expected.item(), rel=1e-5)
    np.testing.assert_allclose(grad["logits"], mine.grad.numpy(), atol=1e-5)


def test_dpo_raises_the_chosen_token_and_lowers_the_rejected():
    def loss(logits):
        chances = jax.nn.log_softmax(logits)
        return losses.dpo(Ratios(chances[0] - np.log(0.5), chances[1] - np.log(0.5)), 0.1)

    grad = jax.grad(loss)(jnp.zeros(2))
    assert grad[0] < 0 < grad[1]
    assert float(loss(jnp.zeros(2))) == pytest.approx(np.log(2))


def test_ipo_rests_at_its_margin():
    margin = 1 / (2 * BETA)

    def loss(chosen):
        return losses.ipo(Ratios(chosen, 0.0), BETA)

    assert float(loss(margin)) == 0
    grads = [float(jax.grad(loss)(margin + d)) for d in (-1.0, 1.0)]
    assert grads[0] < 0 < grads[1]


def test_a_preference_loss_is_one_entry_of_the_registry(monkeypatch):
    def hinge(ratios, beta):
        return jax.nn.relu(1 - beta * (ratios.chosen - ratios.rejected))

    monkeypatch.setitem(losses.LOSSES, "hinge", losses.Loss(hinge))
    config = default_config()
    config.cai.losses = ("sft", "hinge")
    validate(config)
    ratios, on = jnp.array([1.0, 2.0, 9.0, 0.5, 0.0, 0.0]), jnp.array([1.0, 1.0, 0.0])
    (value,) = train.preference_losses(ratios, on, ("hinge",), 0.5).values()
    assert float(value) == pytest.approx((0.75 + 0.0) / 2)  # the third pair fills the batch
