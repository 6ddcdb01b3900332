"""DeRTa's rows, and their loss against torch on the same logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cai_examples import TRIPLES, Logits

from fedsafe_jax.cai import derta
from fedsafe_jax.data import chat
from fedsafe_jax.data.chat import Encoded
from fedsafe_jax.models.loss import packed_loss
from fedsafe_jax.models.microbatch import MICROBATCH_TOKENS


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
    turn = derta.transition(tokenizer, long, np.random.default_rng(0), refusal=7, max_length=256)
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
        ones = Encoded(np.ones(4, np.int32), np.ones(4))
        patch.setattr(derta, "transition", lambda *a, **k: ones)
        derta.batch(
            packaged.tokenizer, triples, range(300), refusal=1, seq=64, rng=np.random.default_rng(0)
        )
    counts = np.bincount(seen, minlength=8)
    assert counts[0] == 100 and counts[7] == 0
    # 200 draws over 1 to 6: 33 each; three standard deviations are 16.
    assert np.all(np.abs(counts[1:7] - 200 / 6) < 17)
