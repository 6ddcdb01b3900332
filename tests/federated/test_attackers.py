"""What malicious clients send, against numpy."""

import jax
import numpy as np
import pytest
from federation import CLIENTS, SGD, close, make_federation
from jax.flatten_util import ravel_pytree

from fedsafe_jax.config import ConfigError, default_config
from fedsafe_jax.federated.attackers import ATTACKERS
from fedsafe_jax.federated.attackers.scaled import to_median_length
from fedsafe_jax.validation import validate

WEIGHTS = np.array([10, 20, 30, 40], np.float32)
MALICIOUS = np.array([False, True, False, False])


@pytest.fixture(scope="module")
def federation():
    return make_federation()


def scales(boost=6.0, kind="scaled"):
    return np.where(MALICIOUS, ATTACKERS[kind].factor(boost), 1.0).astype(np.float32)


def sent_by_clients(federation, spec, **options):
    """Updates `[clients, params]` as the server received them, the state and the report."""
    kept = {}
    state, report = federation.run(
        spec, rounds=1, weights=WEIGHTS, malicious=MALICIOUS, keep_update=kept.__setitem__,
        **options,
    )  # fmt: skip
    return np.stack([kept[i] for i in range(CLIENTS)]), state, report


def test_factors_of_the_attackers():
    assert {kind: entry.factor(3.0) for kind, entry in ATTACKERS.items()} == {
        "boost": 3.0, "min_max": 3.0, "min_sum": 3.0, "scaled": 3.0, "sign_flip": -3.0,
    }  # fmt: skip
    colluding = [kind for kind, entry in ATTACKERS.items() if entry.collude]
    assert colluding == ["min_max", "min_sum", "scaled"]


@pytest.mark.parametrize("honest", [[0, 1, 2, 3], [0, 1, 2], [2], []])
def test_median_length_equals_numpy(honest):
    rng = np.random.default_rng(len(honest))
    updates = np.float32(rng.normal(size=(7, 30)) * np.arange(1, 8)[:, None])
    malicious, good = np.zeros(7, bool), np.zeros(7, bool)
    malicious[[4, 6]], good[honest] = True, True
    found = np.asarray(jax.jit(to_median_length)(updates, malicious, good))
    expected = updates.copy()
    if honest:
        lengths = np.linalg.norm(updates, axis=1)
        expected[malicious] *= (np.median(lengths[good]) / lengths[malicious])[:, None]
    np.testing.assert_allclose(found, expected, rtol=2e-6)
    np.testing.assert_array_equal(found[~malicious], updates[~malicious])


def search(allowed, start=4096.0):
    """The greatest step that is allowed, by halving as in the paper's Algorithm 1."""
    step, width = 0.0, start
    while width > 1e-4:
        step, width = (step + width if allowed(step + width) else step), width / 2
    return step


@pytest.mark.parametrize("kind", ["min_max", "min_sum"])
@pytest.mark.parametrize("honest", [[0, 1, 2, 3, 5], [2, 3], [1], []])
def test_hidden_attackers_equal_the_papers_search(kind, honest):
    rng = np.random.default_rng(len(honest))
    # Updates have much in common, so that distances are small beside lengths.
    updates = np.float32(rng.normal(size=(8, 30)) + 5 * rng.normal(size=30))
    malicious, good = np.zeros(8, bool), np.zeros(8, bool)
    malicious[[4, 6]], good[honest] = True, True
    found = np.asarray(jax.jit(ATTACKERS[kind].collude)(updates, malicious, good))
    np.testing.assert_array_equal(found[~malicious], updates[~malicious])
    if not honest:
        return np.testing.assert_array_equal(found, updates)
    theirs = np.float64(updates[good])
    mean, learned = theirs.mean(0), np.float64(updates[malicious]).mean(0)
    direction = (learned - mean) / np.linalg.norm(learned - mean)
    over = np.max if kind == "min_max" else np.sum

    def far(update):
        return over(np.sum((theirs - update) ** 2, axis=1))

    limit = max(far(update) for update in theirs)
    step = search(lambda step: far(mean + step * direction) <= limit)
    # The search ends within 1e-4; lengths are about 30, of which float32 keeps six digits.
    np.testing.assert_allclose(found[malicious], [mean + step * direction] * 2, atol=5e-4)


def test_a_client_that_learned_nothing_stays_at_nothing():
    updates = np.array([[3.0, 4.0], [0.0, 0.0]], np.float32)
    found = to_median_length(updates, np.array([False, True]), np.array([True, False]))
    np.testing.assert_array_equal(found, updates)


def test_a_scaled_attacker_in_a_round(federation):
    plain, _, _ = sent_by_clients(federation, federation.spec("fedavg", SGD))
    spec = federation.spec("fedavg", SGD, collude=to_median_length)
    found, state, report = sent_by_clients(federation, spec, update_scales=scales())
    lengths = np.linalg.norm(plain, axis=1)
    expected = plain.copy()
    expected[1] *= np.median(lengths[~MALICIOUS]) / lengths[1]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(report.norms, np.linalg.norm(expected, axis=1), rtol=1e-3)
    mean = WEIGHTS @ expected / WEIGHTS.sum()
    start = np.asarray(ravel_pytree(federation.adapter)[0])
    np.testing.assert_allclose(
        ravel_pytree(jax.device_get(state.server.factors))[0], start + mean, atol=1e-6
    )
    cosines = expected @ mean / np.linalg.norm(expected, axis=1) / np.linalg.norm(mean)
    np.testing.assert_allclose(report.cosines, cosines, atol=2e-3)


@pytest.mark.parametrize("options", [{"chunk": 1}, {"chunk": 3}, {"devices": 2, "chunk": 2}])
@pytest.mark.parametrize("aggregator", ["mean", "median"])
def test_a_scaled_attacker_in_chunks_and_on_devices(federation, options, aggregator):
    spec = federation.spec("fedavg", SGD, collude=to_median_length, aggregator=aggregator)
    whole, state, report = sent_by_clients(federation, spec, update_scales=scales())
    found, other, apart = sent_by_clients(federation, spec, update_scales=scales(), **options)
    np.testing.assert_allclose(found, whole, atol=1e-6)
    close(other.server, state.server, atol=1e-6)
    np.testing.assert_allclose(apart.norms, report.norms, rtol=1e-4)


def test_a_scaled_attacker_among_clients_that_the_server_clips(federation):
    """Honest updates are as long as the limit, and so is the malicious one: none stands out."""
    spec = federation.spec("fedavg", SGD, collude=to_median_length, clip_norm=1e-3)
    found, _, _ = sent_by_clients(federation, spec, update_scales=scales())
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1e-3, rtol=1e-4)


def test_sign_flip_in_a_round(federation):
    plain, _, _ = sent_by_clients(federation, federation.spec("fedavg", SGD))
    flipped, _, _ = sent_by_clients(
        federation, federation.spec("fedavg", SGD), update_scales=scales(2.0, "sign_flip")
    )
    np.testing.assert_allclose(flipped[1], -2 * plain[1], atol=1e-7)
    np.testing.assert_array_equal(flipped[~MALICIOUS], plain[~MALICIOUS])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"attack.kind": "scale"},
            "attack.kind: 'scale' is not one of boost, min_max, min_sum, scaled, sign_flip.",
        ),
        ({"attack.boost": -4.0}, "attack.boost=-4.0: expected more than 0"),
        ({"attack.boost": float("nan")}, "attack.boost=nan: expected more than 0"),
        ({"attack.boost": float("inf")}, "attack.boost=inf: expected more than 0"),
    ],
)
def test_wrong_attackers_are_refused(changes, message):
    c = default_config()
    c.update_from_flattened_dict(changes)
    with pytest.raises(ConfigError) as caught:
        validate(c)
    assert message in str(caught.value)
