"""Compressed updates, error feedback, bytes."""

import jax.numpy as jnp
import numpy as np
from federation import SGD, close, make_federation

from fedsafe_jax.federated import compression


def test_topk_keeps_the_largest():
    code = compression.make("topk", 0.25)
    x = np.array([0.1, -5, 2, 0.3, 0, -0.2, 4, 1], np.float32)
    np.testing.assert_array_equal(code.roundtrip(jnp.asarray(x)), [0, -5, 0, 0, 0, 0, 4, 0])
    assert code.num_bytes(8) == 16 and code.num_bytes(1000) == 2000


def test_int8_is_within_half_a_step():
    code, x = compression.make("int8"), np.random.default_rng(0).normal(size=1000)
    x[256:512] = 0
    found = np.asarray(code.roundtrip(jnp.asarray(x, jnp.float32)))
    step = np.abs(np.pad(x, (0, 24)).reshape(4, 256)).max(1) / 127
    assert np.all(np.abs(found - x) <= np.repeat(step, 256)[:1000] / 2 + 1e-7)
    assert code.num_bytes(1000) == 1000 + 4 * 4


def test_error_feedback_loses_nothing():
    code, rng = compression.make("topk", 0.1), np.random.default_rng(1)
    updates = rng.normal(size=(20, 50)).astype(np.float32)
    residual, received = jnp.zeros(50), np.zeros(50)
    for update in updates:
        decoded, residual = compression.send(code, jnp.asarray(update), residual)
        received += np.asarray(decoded)
    np.testing.assert_allclose(received + np.asarray(residual), updates.sum(0), atol=1e-4)


def test_a_round_sends_fewer_bytes_and_keeps_what_is_left():
    federation = make_federation()
    plain, before = federation.run(federation.spec("fedavg", SGD), rounds=1)
    code = compression.make("topk", 0.1)
    spec = federation.spec("fedavg", SGD, compression=code)
    state, report = federation.run(spec, rounds=1)
    assert report.bytes_up < before.bytes_up / 4 and report.bytes_down == before.bytes_down
    # What the server got and what the clients keep is the whole update.
    weights = np.array([10.0, 20, 30, 0]) / 60
    left = weights @ state.clients["residuals"][:4]
    flat = [
        np.concatenate([np.ravel(v) for v in jnp_leaves(s.server.factors)]) for s in (plain, state)
    ]
    np.testing.assert_allclose(flat[0], flat[1] + left, atol=1e-6)
    assert np.all(state.clients["residuals"][3:] == 0)
    close(federation.run(spec, devices=2, chunk=2)[0], federation.run(spec)[0])


def jnp_leaves(tree):
    import jax

    return jax.tree.leaves(tree)
