"""Dropout of adapters: what is dropped, and that it is the same wherever a token is computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config

from fedsafe_jax.data.batches import RoundBatches
from fedsafe_jax.data.chat import Encoded
from fedsafe_jax.data.packing import Batch, NoisyBatch
from fedsafe_jax.models import dropout, lora, loss, microbatch
from fedsafe_jax.models.decoder import Decoder
from fedsafe_jax.models.decoder_layer import Projection

RATE = 0.25
LORA = lora.LoraConfig(4, 8.0, lora.expand_targets("all-linear"), dropout=RATE)


def noise(*shape):
    return np.random.default_rng(0).integers(2**32, size=shape, dtype=np.uint32)


def test_a_projection_drops_inputs_of_its_factors_alone():
    """By the formula of PEFT's LoRA: `x W + scale * drop(x) a b`."""
    rng = np.random.default_rng(1)
    x, w = rng.normal(size=(2, 6, 8)), rng.normal(size=(8, 5))
    a, b = rng.normal(size=(8, 3)), rng.normal(size=(3, 5))
    drop = dropout.Dropout(noise(2, 6), jnp.int32(1), rate=RATE)
    variables = {"params": {"kernel": w}, "lora": {"a": a, "b": b}}
    kept = np.asarray(drop.apply(jnp.ones_like(x), "up_proj")) != 0
    with jax.default_matmul_precision("float32"):
        out = Projection(5, 2.0, name="up_proj").apply(variables, x, drop)
    expected = x @ w + 2.0 * (np.where(kept, x / (1 - RATE), 0) @ a) @ b
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_the_share_that_is_dropped_and_the_mean_that_stays():
    x = jnp.full((64, 64, 32), 3.0)
    out = np.asarray(dropout.Dropout(noise(64, 64), jnp.int32(0), rate=RATE).apply(x, "q_proj"))
    assert set(np.unique(out)) == {0.0, 4.0}  # 3 / (1 - 0.25)
    count = out.size
    # Five standard deviations of a binomial share.
    bound = 5 * np.sqrt(RATE * (1 - RATE) / count)
    assert abs(np.mean(out == 0) - RATE) < bound
    for axis in (0, 1, 2):  # no row, token or dimension that is dropped more often
        share = np.mean(out == 0, axis=tuple({0, 1, 2} - {axis}))
        assert np.abs(share - RATE).max() < 6 * np.sqrt(RATE * (1 - RATE) * share.size / count)


def test_layers_projections_and_tokens_drop_their_own():
    x = jnp.ones((1, 2, 512))
    masks = [
        np.asarray(dropout.Dropout(noise(1, 2), jnp.int32(i), rate=0.5).apply(x, name) != 0)[0, t]
        for i in (0, 1)
        for name in dropout.NUMBERS
        for t in (0, 1)
    ]
    for i, one in enumerate(masks):
        for other in masks[:i]:
            assert 0.38 < np.mean(one == other) < 0.62  # half, within five standard deviations


def batch_of(rows, seq, with_noise=True):
    rng = np.random.default_rng(2)
    segments = np.repeat([[1] * (seq // 2) + [2] * (seq - seq // 2)], rows, 0)
    positions = np.concatenate([np.arange(seq // 2), np.arange(seq - seq // 2)])
    batch = Batch(
        rng.integers(0, 97, (rows, seq)).astype(np.int32),
        targets=rng.integers(0, 97, (rows, seq)).astype(np.int32),
        mask=(rng.random((rows, seq)) < 0.4).astype(np.float32),
        segment_ids=segments.astype(np.int32),
        positions=np.repeat([positions], rows, 0).astype(np.int32),
    )
    return NoisyBatch(**batch._asdict(), noise=noise(rows, seq)) if with_noise else batch


@pytest.fixture(scope="module")
def model():
    config, blank = tiny_config(), jnp.zeros((1, 4), jnp.int32)
    params = Decoder(config).init(jax.random.key(0), blank, blank, blank)["params"]
    factors = lora.init(jax.random.key(1), config, LORA)
    factors = jax.tree.map(lambda x: x + 0.1, factors)
    return Decoder(config, LORA.scale, LORA.dropout), params, factors


def test_the_sparse_last_layer_drops_what_the_whole_one_does(model):
    decoder, params, factors = model
    batch = batch_of(2, 24)
    sparse = jax.value_and_grad(loss.packed_loss, 1)(decoder, factors, params, batch)

    def whole(factors):
        hidden, _ = decoder.apply(
            {"params": params, "lora": factors},
            batch.tokens,
            batch.positions,
            batch.segment_ids,
            noise=batch.noise,
        )
        nll = loss.token_nll(decoder, params, hidden, batch.targets, batch.mask)
        return loss.masked_mean(nll, batch.mask)

    expected = jax.value_and_grad(whole)(factors)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), sparse, expected)
    still = loss.packed_loss(decoder, factors, params, Batch(*batch[:5]))
    assert abs(still - sparse[0]) > 1e-3


def test_microbatches_and_the_queue_of_clients_drop_the_same(model, monkeypatch):
    decoder, params, factors = model
    batch = batch_of(4, 16)
    expected = jax.value_and_grad(loss.packed_loss, 1)(decoder, factors, params, batch)
    monkeypatch.setitem(microbatch.MICROBATCH_TOKENS, "cpu", 32)

    def loss_fn(factors, base, batch):
        return loss.packed_loss(decoder, factors, base, batch)

    by_parts = microbatch.value_and_grad_in_microbatches(loss_fn, platform="cpu")
    parts = jax.jit(by_parts)(factors, params, batch)
    # Float32 sums in another order: 2e-5 were seen. Other noise of one token that is learned from
    # moves them by 1e-4 to 1e-1.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=4e-5), parts, expected)
    from fedsafe_jax.federated.mesh import make_mesh

    queue = microbatch.value_and_grad_in_microbatches(loss_fn, make_mesh(jax.devices()[:2]))
    two = jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), batch)
    values, _ = jax.jit(jax.vmap(queue, (None, None, 0)))(factors, params, two)
    np.testing.assert_allclose(values, [expected[0]] * 2, atol=1e-5)


def test_without_noise_or_rate_the_program_is_what_it_was(model):
    decoder, params, factors = model

    def program(model, batch):
        text = jax.make_jaxpr(lambda f: loss.packed_loss(model, f, params, batch))(factors)
        return str(text)

    plain = Decoder(decoder.config, LORA.scale)
    without = program(plain, batch_of(2, 24, with_noise=False))
    assert "threefry" not in without and "random" not in without
    assert program(decoder, batch_of(2, 24, with_noise=False)).count("\n") == without.count("\n")
    assert "random_bits" in program(decoder, batch_of(2, 24))


def test_noise_comes_from_seed_round_and_client_alone():
    clients = [[Encoded(np.arange(9, dtype=np.int32), np.ones(9, bool))] * 4 for _ in range(4)]

    def drawn(seed=0, t=0, ids=(0, 1, 2, 3), start=0, stop=4):
        batches = RoundBatches(
            clients, seed, t, ids=ids, steps=[2] * len(ids), local_steps=2, batch_size=2, seq=16,
            noise=True,
        )  # fmt: skip
        return batches.chunk(start, stop).noise

    whole = drawn()
    np.testing.assert_array_equal(drawn(), whole)  # as after a resumption
    np.testing.assert_array_equal(drawn(start=2), np.pad(whole[2:], ((0, 2), *[(0, 0)] * 3))[:2])
    np.testing.assert_array_equal(drawn(ids=(3, 1), stop=2), whole[[3, 1]])
    for other in (drawn(seed=1), drawn(t=1), whole[::-1]):
        assert np.mean(other == whole) < 0.01


def test_noise_of_a_client_does_not_depend_on_its_cohort():
    """A longer client makes more rows for all; under differential privacy it would move them all,
    and a site of its own, which knows no other client, would drop other numbers."""
    short = [Encoded(np.arange(9, dtype=np.int32), np.ones(9, bool))] * 4
    clients = [short, [Encoded(np.arange(16, dtype=np.int32), np.ones(16, bool))] * 4]

    def drawn(ids):
        batches = RoundBatches(
            clients, 0, 0, ids=ids, steps=[2] * len(ids), local_steps=2, batch_size=3, seq=32,
            noise=True,
        )  # fmt: skip
        return batches.chunk(0, 1)

    alone, beside = drawn([0]), drawn([0, 1])
    rows = alone.tokens.shape[2]
    assert beside.tokens.shape[2] > rows
    for own, other in zip(alone, beside, strict=True):
        np.testing.assert_array_equal(own, other[:, :, :rows])
