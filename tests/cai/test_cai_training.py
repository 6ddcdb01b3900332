"""CAI's losses against torch on the same logits, DeRTa's rows, and the training step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedsafe_jax.cai import derta, losses, train
from fedsafe_jax.data import chat
from fedsafe_jax.data.chat import Encoded
from fedsafe_jax.models import lora
from fedsafe_jax.models.loss import packed_loss
from fedsafe_jax.models.microbatch import MICROBATCH_TOKENS

VOCABULARY, SIZE, SEQ, BETA = 11, 3, 16, 0.3
NAMES = ("dpo", "ipo", "kto")


class Logits:
    """Stands for a decoder: its logits are its adapter, or its parameters without one."""

    def apply(self, variables, x, *place, method=None):
        if method == "unembed":
            return x
        return variables.get("lora", variables["params"])["logits"], None


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
    return train.pack_pairs(pairs, others, SIZE, SEQ)


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


def test_imitation_and_derta_equal_torch_on_the_same_logits(packaged, rng_batch, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setitem(MICROBATCH_TOKENS, "cpu", 0)  # the stand-in has no last layer to spare
    batch, refusal = rng_batch
    size = len(packaged.tokenizer)
    logits = np.random.default_rng(2).normal(size=(*batch.tokens.shape, size)).astype(np.float32)

    def loss(adapter):
        return packed_loss(Logits(), adapter, {}, batch)

    value, grad = jax.value_and_grad(loss)({"logits": jnp.asarray(logits)})
    mine = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    ignored = np.where(batch.mask > 0, batch.targets, -100).reshape(-1)
    expected = torch.nn.functional.cross_entropy(
        mine.reshape(-1, size), torch.tensor(ignored, dtype=torch.long), ignore_index=-100
    )
    expected.backward()
    assert float(value) == pytest.approx(expected.item(), rel=1e-5)
    np.testing.assert_allclose(grad["logits"], mine.grad.numpy(), atol=1e-5)
    assert refusal in ignored


TRIPLES = [
    derta.Triple(
        f"How do I do number {i}?", "Sure, here is how: " + "step then " * 30, "I'm sorry."
    )
    for i in range(4)
]


@pytest.fixture(scope="module")
def rng_batch(packaged):
    refusal = derta.refusal_token(packaged.tokenizer)
    batch = derta.batch(
        packaged.tokenizer,
        TRIPLES,
        range(4),
        refusal=refusal,
        seq=128,
        rng=np.random.default_rng(0),
    )
    return batch, refusal


def test_dpo_raises_the_chosen_token_and_lowers_the_rejected():
    def loss(logits):
        chances = jax.nn.log_softmax(logits)
        return losses.dpo(chances[0] - np.log(0.5), chances[1] - np.log(0.5), 0.1)

    grad = jax.grad(loss)(jnp.zeros(2))
    assert grad[0] < 0 < grad[1]
    assert float(loss(jnp.zeros(2))) == pytest.approx(np.log(2))


def test_ipo_rests_at_its_margin():
    margin = 1 / (2 * BETA)
    assert float(losses.ipo(margin, 0.0, BETA)) == 0
    grads = [float(jax.grad(losses.ipo)(margin + d, 0.0, BETA)) for d in (-1.0, 1.0)]
    assert grads[0] < 0 < grads[1]


def text_of(tokenizer, encoded, learned):
    return tokenizer.decode(encoded.ids[encoded.loss_mask == learned], skip_special_tokens=True)


def test_derta_rows_in_the_forms_of_the_upstream_data(packaged):
    """The four kinds of upstream rows: benign, safe at once, safe behind a prefix, transition."""
    tokenizer = packaged.tokenizer
    benign = chat.encode(tokenizer, (("user", "Name a game."),), "Chess is one.", 64)
    assert text_of(tokenizer, benign, True).strip() == "Chess is one."
    triple = derta.Triple("How do I do it?", "Sure, first do this and then do that.", "I'm sorry.")
    at_once = derta.prefixed(tokenizer, triple, 0, 64)
    same = chat.encode(tokenizer, (("user", triple.prompt),), triple.safe, 64)
    np.testing.assert_array_equal(at_once.ids, same.ids)
    np.testing.assert_array_equal(at_once.loss_mask, same.loss_mask)
    behind = derta.prefixed(tokenizer, triple, 4, 64)
    assert text_of(tokenizer, behind, True).strip() == "I'm sorry."
    assert text_of(tokenizer, behind, False).rstrip().endswith("Sure, first do this")
    ending = same.ids[same.loss_mask][-1]  # the end of the turn is learned as well
    assert behind.ids[behind.loss_mask][-1] == ending
    long = triple._replace(harmful="one two three four " * 25)
    turn = derta.transition(tokenizer, long, np.random.default_rng(0), 256)
    whole = chat.encode(tokenizer, (("user", long.prompt),), long.harmful, 256)
    assert turn.loss_mask.sum() == -(-whole.loss_mask.sum() // 20)  # a twentieth, rounded up
    assert np.all(whole.loss_mask[turn.loss_mask])


def test_derta_batches_replace_the_targets_of_transitions_alone(packaged, rng_batch):
    batch, refusal = rng_batch
    assert packaged.tokenizer.decode([refusal]).strip().lower().startswith("s")
    on = batch.mask > 0
    own = np.zeros_like(batch.targets)
    own[:, :-1] = batch.tokens[:, 1:]
    changed = on & (batch.targets != own)
    assert changed.any() and np.all(batch.targets[changed] == refusal)
    # Half of the rows are transitions: along the others every target is the next token.
    kinds = {}
    for r, s in {(r, s) for r, s in zip(*np.nonzero(on), strict=True)}:
        kinds.setdefault((r, batch.segment_ids[r, s]), set()).add(bool(changed[r, s]))
    assert sorted(map(sorted, kinds.values())) == [[False]] * 4 + [[True]] * 4


def test_prefixes_are_uniform_and_none_for_a_third(packaged):
    harmful = " ".join(f"w{i}" for i in range(8))
    triples = [derta.Triple("q", harmful, "I'm sorry.")] * 300
    seen = []

    def spy(tokenizer, triple, words, max_length):
        seen.append(words)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(derta, "prefixed", spy)
        patch.setattr(derta, "transition", lambda *a: Encoded(np.ones(4, np.int32), np.ones(4)))
        derta.batch(
            packaged.tokenizer, triples, range(300), refusal=1, seq=64, rng=np.random.default_rng(0)
        )
    counts = np.bincount(seen, minlength=8)
    assert counts[0] == 100 and counts[7] == 0
    # 200 draws over 1 to 6: 33 each; three standard deviations are 16.
    assert np.all(np.abs(counts[1:7] - 200 / 6) < 17)


def recipe(*names, weights=None):
    return train.Recipe(
        names, weights or (1.0,) * len(names), 0.1, batch_size=2, pairs_per_step=2, seq=64
    )


def encoder(tokenizer):
    return lambda prompt, response: chat.encode(tokenizer, (("user", prompt),), response, 64)


@pytest.mark.parametrize("names", [("sft",), ("sft", "dpo"), ("ipo",), ("kto",), ("derta",)])
def test_every_loss_learns_what_it_is_told(packaged, names):
    shape = lora.LoraConfig(8, 16.0, ("q_proj", "v_proj"))
    model = packaged.model.__class__(packaged.config, shape.scale)
    start, step = train.make_step(model, recipe(*names))
    adapter = lora.init(jax.random.key(0), packaged.config, shape)
    encode = encoder(packaged.tokenizer)
    triples = [t._replace(harmful="Sure, step one, step two.") for t in TRIPLES]
    imitation = [encode(t.prompt, t.safe) for t in triples]
    refusal = derta.refusal_token(packaged.tokenizer)
    data = train.steps(
        recipe(*names),
        12,
        imitation,
        triples=triples,
        encode=encode,
        seed=(0,),
        tokenizer=packaged.tokenizer,
        refusal=refusal,
    )
    state, found = start(adapter), []
    for one in data:
        adapter, state, each = step(adapter, state, None, packaged.params, one, jnp.float32(2e-3))
        found.append({k: float(v) for k, v in each.items()})
    assert set(found[0]) == {"sft", *names}
    for name in names:
        assert np.mean([f[name] for f in found[-3:]]) < found[0][name]
    if "dpo" in names:
        assert found[0]["dpo"] == pytest.approx(np.log(2), rel=1e-4)  # the adapter starts at zero


def test_steps_have_one_shape_and_cover_every_pair(packaged):
    encode = encoder(packaged.tokenizer)
    triples = [t._replace(harmful="Sure " * (5 * i + 1)) for i, t in enumerate(TRIPLES)]
    imitation = [encode(t.prompt, t.safe) for t in triples]
    data = train.steps(
        recipe("sft", "kto"), 6, imitation, triples=triples, encode=encode, seed=(3,)
    )
    shapes = {str(jax.tree.map(np.shape, s)) for s in data}
    assert len(shapes) == 1
    again = train.steps(
        recipe("sft", "kto"), 6, imitation, triples=triples, encode=encode, seed=(3,)
    )
    jax.tree.map(np.testing.assert_array_equal, data, again)
    assert all(s.pairs.on.sum() == 2 for s in data)
    empty = train.steps(recipe("sft", "dpo"), 2, imitation, triples=[], encode=encode, seed=(3,))
    assert all(s.pairs is None for s in empty)
