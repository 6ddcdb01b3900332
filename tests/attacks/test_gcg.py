"""Greedy coordinate gradient: against torch, by its buffer, and against random search.

Tolerance: float32 on CPU, another order of sums; 1e-4 is the bound that the project promises. The
gradients here are of size 0.1 to 1.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import VOCAB, checkpoint

from fedsafe_jax.attacks import AttackError, Settings, gcg, suffix, target_loss
from fedsafe_jax.data import chat
from fedsafe_jax.data.examples import Example
from fedsafe_jax.inference.language_model import LanguageModel
from fedsafe_jax.models import hub

TOLERANCE = 1e-4
REQUEST = Example((("system", "Be brief."), ("user", "Name a colour.")), "")
TARGET = "Sure, here is a colour: red."
SETTINGS = Settings(steps=12, candidates=16, chunk=16, top_k=64, suffix_tokens=8, target_tokens=8)


def test_gradients_and_losses_are_torchs(tmp_path):
    torch = pytest.importorskip("torch")
    reference = checkpoint("mistral", tmp_path)
    config = hub.read_config(tmp_path)
    params = hub.load_params(tmp_path, config, "float32")
    lm = LanguageModel(config, params, tokenizer=None, hf_config={})
    rng = np.random.default_rng(0)
    # More before the suffix than the window of 8 tokens, and two targets of different lengths.
    before, after, first, second = (rng.integers(3, VOCAB, n).tolist() for n in (13, 3, 5, 2))
    suffixes = rng.integers(3, VOCAB, (4, 6)).astype(np.int32)

    def loss(rows):
        table, total = reference.get_input_embeddings().weight, 0
        for target in (first, second):
            parts = [table[before], rows @ table, table[[*after, *target]]]
            logits = reference(inputs_embeds=torch.cat(parts)[None]).logits[0]
            said = logits[-len(target) - 1 : -1]
            total = total + torch.nn.functional.cross_entropy(said, torch.tensor(target))
        return total / 2

    one_hot = torch.nn.functional.one_hot(torch.tensor(suffixes).long(), VOCAB).float()
    rows = one_hot[0].clone().requires_grad_(True)
    loss(rows).backward()
    with torch.no_grad():
        expected = [loss(one).item() for one in one_hot]

    behind = (target_loss.read_before(lm, before, after, targets=[first, second]),)
    inputs = (lm.model,), (target_loss.variables_of(lm),), behind
    ours = target_loss.losses(*inputs, suffixes.reshape(2, 2, 6))
    np.testing.assert_allclose(np.ravel(ours), expected, atol=TOLERANCE)
    gradient = target_loss.gradient(*inputs, suffixes[0])
    assert np.abs(rows.grad.numpy()).max() > 0.1
    np.testing.assert_allclose(gradient, rows.grad.numpy(), atol=TOLERANCE)


def search(lm, settings=SETTINGS, **others):
    allowed = suffix.allowed_tokens(lm.tokenizer, lm.config.vocab_size)
    return gcg.Search([lm], REQUEST, [TARGET], settings=settings, allowed=allowed, **others)


@pytest.fixture(scope="module")
def searched(packaged):
    """A search with the buffer, and its losses."""
    one = search(packaged)
    return one, one.run(jax.random.key(0))


def test_the_loss_never_rises_and_random_search_is_worse(packaged, searched):
    one, trace = searched
    assert (np.diff(trace) <= 0).all() and trace[-1] < trace[0] - 0.3

    def noise(models, variables, behind, ids):
        key = jax.random.fold_in(jax.random.key(1), int(ids.sum()))
        return jax.random.normal(key, (len(ids), packaged.config.vocab_size))

    # Every token is as likely as any other. Two more steps pay for the gradients.
    settings = SETTINGS._replace(top_k=1 << 20, steps=SETTINGS.steps + 2)
    blind = search(packaged, settings, gradient=noise)
    blind.run(jax.random.key(0))
    assert blind.queries >= one.queries
    assert one.loss < blind.loss - 0.1


def test_what_is_scored_is_what_the_text_becomes(packaged, searched):
    """The loss of the text that is sent, from logits of the whole prompt without a cache."""
    one, trace = searched
    prompt = chat.prompt(packaged.tokenizer, one.messages).ids
    assert one.messages[-1][1].startswith("Name a colour.")
    assert len(prompt) == len(chat.prompt(packaged.tokenizer, REQUEST.messages).ids) + 8
    target = packaged.tokenizer(TARGET, add_special_tokens=False)["input_ids"][:8]
    logits = packaged.on_one_device()(np.array([prompt + target]))[0]
    logp = jax.nn.log_softmax(logits)[len(prompt) - 1 : -1]
    assert -logp[np.arange(8), target].mean() == pytest.approx(trace[-1], abs=TOLERANCE)


def test_suffixes_that_become_other_tokens_are_none(packaged):
    tokenizer = packaged.tokenizer
    place = suffix.place(tokenizer, REQUEST, 2)
    whole = tokenizer(" the and", add_special_tokens=False)["input_ids"]
    apart = [tokenizer(x, add_special_tokens=False)["input_ids"] for x in (" t", "he")]
    assert [len(whole), *map(len, apart)] == [2, 1, 1]
    assert suffix.as_text(tokenizer, place, whole) == " the and"
    assert suffix.as_text(tokenizer, place, sum(apart, [])) is None
    allowed = suffix.allowed_tokens(tokenizer, packaged.config.vocab_size)
    assert not allowed[tokenizer.all_special_ids].any() and allowed[whole].all()


def test_candidates_change_one_token_to_a_steep_one():
    gradient = jnp.asarray(np.random.default_rng(0).normal(size=(5, 40)), jnp.float32)
    allowed = np.arange(40) % 3 > 0
    start = np.zeros(5, np.int32)
    drawn = gcg.propose(
        jax.random.key(0), gradient, suffix=start, allowed=allowed, top_k=4, count=200
    )
    steep = np.argsort(np.where(allowed, gradient, np.inf), axis=1)[:, :4]
    assert (np.count_nonzero(drawn, axis=1) == 1).all()
    for row in np.asarray(drawn):
        (at,) = np.flatnonzero(row)
        assert row[at] in steep[at]
    assert {int(np.flatnonzero(row)[0]) for row in np.asarray(drawn)} == set(range(5))


def test_models_of_other_tokenizers_are_refused(packaged):
    other = types.SimpleNamespace(
        tokenizer=types.SimpleNamespace(get_vocab=lambda: {"a": 0}),
        config=packaged.config,
        name="other",
    )
    with pytest.raises(AttackError, match="other and .* different tokenizers"):
        gcg.check_models([packaged, other])
