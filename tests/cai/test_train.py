"""The training step of Constitutional AI, and a round's data."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cai_examples import TRIPLES
from tiny import tiny_config

from fedsafe_jax.cai import derta, steps, train
from fedsafe_jax.data import chat
from fedsafe_jax.data.chat import Encoded
from fedsafe_jax.data.packing import assign_rows, fill
from fedsafe_jax.federated import simulation
from fedsafe_jax.federated.mesh import make_mesh
from fedsafe_jax.models import lora
from fedsafe_jax.models.decoder import Decoder
from fedsafe_jax.models.loss import packed_divergence

SHAPE = lora.LoraConfig(4, 8.0, ("q_proj",))


def recipe(*names, weights=None):
    return steps.Recipe(
        names, weights or (1.0,) * len(names), 0.1, batch_size=2, pairs_per_step=2, seq=64
    )


def encoder(tokenizer):
    return lambda turns, response: chat.encode(tokenizer, turns, response, 64)


@pytest.mark.parametrize("names", [("sft",), ("sft", "dpo"), ("ipo",), ("kto",), ("derta",)])
def test_every_loss_learns_what_it_is_told(packaged, names):
    shape = lora.LoraConfig(8, 16.0, ("q_proj", "v_proj"))
    model = packaged.model.__class__(packaged.config, shape.scale)
    start, step = train.make_step(model, recipe(*names))
    adapter = lora.init(jax.random.key(0), packaged.config, shape)
    encode = encoder(packaged.tokenizer)
    triples = [t._replace(harmful="Sure, step one, step two.") for t in TRIPLES]
    imitation = [encode(t.turns, t.safe) for t in triples]
    refusal = derta.refusal_token(packaged.tokenizer)
    data = steps.make_steps(
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
    imitation = [encode(t.turns, t.safe) for t in triples]
    data = steps.make_steps(
        recipe("sft", "kto"), 6, imitation, triples=triples, encode=encode, seed=(3,)
    )
    shapes = {str(jax.tree.map(np.shape, s)) for s in data}
    assert len(shapes) == 1
    again = steps.make_steps(
        recipe("sft", "kto"), 6, imitation, triples=triples, encode=encode, seed=(3,)
    )
    jax.tree.map(np.testing.assert_array_equal, data, again)
    assert all(s.pairs.on.sum() == 2 for s in data)
    empty = steps.make_steps(
        recipe("sft", "dpo"), 2, imitation, triples=[], encode=encode, seed=(3,)
    )
    assert all(s.pairs is None for s in empty)


def test_pairs_of_answers_keep_the_dialogue_before_them(packaged):
    words = packaged.tokenizer
    before = (("system", "Be brief."), ("user", "I bake bread."), ("assistant", "Good."))
    triple = TRIPLES[0]._replace(
        prompt="How long?", harmful="Sure, all night.", messages=(*before, ("user", "How long?"))
    )
    alone = triple._replace(messages=())
    texts = {}
    for name, one in (("whole", triple), ("alone", alone)):
        (step,) = steps.make_steps(
            recipe("dpo", "derta", weights=(1.0, 1.0)), 1,
            [encoder(words)(one.turns, one.safe)], triples=[one], encode=encoder(words),
            seed=(0,), tokenizer=words, refusal=1,
        )  # fmt: skip
        batches = {"imitation": step.imitation, "pairs": step.pairs.rows} | step.rows
        texts[name] = {k: words.decode(b.tokens.reshape(-1)) for k, b in batches.items()}
    assert set(texts["whole"]) == {"imitation", "pairs", "derta"}
    for kind, text in texts["whole"].items():
        assert text.count("I bake bread.") == text.count("How long?") > 0, kind
        assert text.count("Be brief.") == text.count("How long?"), kind
        assert "bread" not in texts["alone"][kind]


def test_steps_on_given_devices_are_compiled_once(packaged):
    """Factors of a run lie on its mesh; so has the state of the optimizer, from the first step."""
    lm = packaged.with_adapter(
        lora.Adapter(lora.init(jax.random.key(0), packaged.config, SHAPE), SHAPE)
    )
    place = jax.sharding.SingleDeviceSharding(jax.devices()[1])
    factors, params = jax.device_put((lm.factors, lm.params), place)
    start, step = train.make_step(lm.model, recipe("sft"))
    state, before = start(factors), step._cache_size()  # other tests may share the step
    encoded = chat.encode(lm.tokenizer, (("user", "Hello"),), "Hi.", 64)
    data = steps.make_steps(recipe("sft"), 3, [encoded], triples=[], encode=None, seed=(0,))
    for one in data:
        factors, state, _ = step(factors, state, None, params, one, jnp.float32(1e-3))
    assert step._cache_size() == before + 1
    assert {x.sharding for x in jax.tree.leaves(state)} == {place}


def test_the_replay_is_held_and_not_imitated(packaged):
    """Under "kl" what is replayed is a batch of its own, and the model stays what it was there."""
    encode = encoder(packaged.tokenizer)
    replay = [encode((("user", text),), "Chess is one.") for text in ("Name a game.", "A game?")]
    revised = [encode(t.turns, t.safe) for t in TRIPLES]
    ends = {}
    for names in (("sft",), ("sft", "kl")):
        how = recipe(*names)
        data = steps.make_steps(
            how, 12, [*replay, *revised], triples=[], encode=encode, seed=(0,), replayed=len(replay)
        )
        shown = [(packaged.tokenizer.decode(s.imitation.tokens.reshape(-1)), s.held) for s in data]
        assert any("game" in text for text, _ in shown) == ("kl" not in names)
        model = packaged.model.__class__(packaged.config, SHAPE.scale)
        start, step = train.make_step(model, how)
        adapter = lora.init(jax.random.key(0), packaged.config, SHAPE)
        state = start(adapter)
        for one in data:
            adapter, state, values = step(
                adapter, state, None, packaged.params, one, jnp.float32(2e-3)
            )
            assert set(values) == set(names)
        rows = assign_rows([len(e.ids) for e in replay], 64)
        held = fill(replay, rows, len(rows), 64)
        ends[names] = float(packed_divergence(model, None, adapter, packaged.params, batch=held))
    assert 0 < ends["sft", "kl"] < ends["sft",] / 2
    held_alone = steps.make_steps(
        recipe("kl"), 1, replay, triples=[], encode=encode, seed=(0,), replayed=len(replay)
    )
    assert not held_alone[0].imitation.mask.any() and held_alone[0].held.mask.any()


def test_devices_share_the_rows_of_a_step():
    """On a mesh a step is what it is on one device, whatever rows each device gets."""
    rng, how = np.random.default_rng(0), recipe("sft", "kl", "dpo", "kto", "derta")
    how = how._replace(weights=(1.0, 2.0, 0.5, 0.5, 0.7), seq=16)

    def encoded(size):
        return Encoded(rng.integers(1, 97, size).astype(np.int32), np.arange(size) >= size // 3)

    def packed(*sizes):  # one to a row; the last row has none
        return fill(
            [encoded(n) for n in sizes], [[i] for i in range(len(sizes))], len(sizes) + 1, 16
        )

    answers = [(encoded(n), encoded(n + 1)) for n in (5, 9)]
    data = steps.Step(
        packed(16, 9, 12, 4, 7),
        steps.pack_pairs(answers, answers[::-1], 2, 16),
        {"derta": packed(8)},
        packed(11, 13),
    )
    shape = lora.LoraConfig(2, 4.0, ("q_proj", "v_proj", "down_proj"))
    blank = jnp.zeros((1, 4), jnp.int32)
    base = Decoder(tiny_config()).init(jax.random.key(0), blank, blank, blank)["params"]
    drawn = lora.init(jax.random.key(1), tiny_config(), shape)
    factors = jax.tree.map(lambda x: x + 0.05, drawn)
    reference = jax.tree.map(lambda x: x + 0.02, drawn)
    found = []
    for mesh in (None, make_mesh(jax.devices()[:4])):
        config = tiny_config(mesh=mesh)
        start, step = train.make_step(Decoder(config, shape.scale), how)
        put = (lambda x: x) if mesh is None else functools.partial(simulation.replicate, mesh=mesh)
        mine, fixed, params = put(factors), put(reference), put(base)
        moved, (_, adam), losses = step(mine, start(mine), fixed, params, data, jnp.float32(1e-2))
        assert set(losses) == set(how.losses)
        assert jax.tree.structure(moved) == jax.tree.structure(mine)
        found.append((losses, adam.mu))
    # float32 sums over rows in another order.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), *found)
