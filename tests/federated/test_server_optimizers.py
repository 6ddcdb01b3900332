"""Server optimizers against OpenFedLLM's own numbers and the papers' formulas."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedsafe_jax.federated import aggregation, algorithms
from fedsafe_jax.federated.algorithms import Hyperparameters
from fedsafe_jax.federated.client import LocalTraining, make_optimizer

# Three rounds of two clients, from OpenFedLLM's global_aggregate in float64.
DELTAS = np.array(
    [[[0.5, -0.2], [-0.3, 0.4]], [[0.1, 0.1], [0.2, -0.3]], [[-0.4, 0.05], [0.0, 0.25]]]
)
WEIGHTS = np.array([10.0, 30.0])
OPENFEDLLM = Hyperparameters(adaptive_learning_rate=1e-3, second_moment="m2", first_moment="copy")
GOLDEN = {
    "fedavg": [[0.9, -0.75], [1.075, -0.95], [0.975, -0.75]],
    "fedprox": [[0.9, -0.75], [1.075, -0.95], [0.975, -0.75]],
    "fedavgm": [[0.9, -0.75], [0.8275, -0.545], [0.75225, -0.3405]],
    "fedadagrad": [
        [1.00099005, -0.99900995],
        [1.001817498, -0.999712074],
        [1.00107747, -0.998987988],
    ],
    "fedyogi": [
        [1.009049876, -0.990950124],
        [1.01580905, -0.985171962],
        [1.020107319, -0.979903765],
    ],
    "fedadam": [
        [1.009050283, -0.990949717],
        [1.015824777, -0.985154913],
        [1.020146951, -0.979859151],
    ],
}


def server_run(name, hyperparameters, weights=WEIGHTS, deltas=DELTAS):
    training = LocalTraining(None, make_optimizer())
    algorithm = algorithms.make(name, training, 10, hyperparameters)
    state, steps = algorithm.init({"x": jnp.array([1.0, -1.0])}), []
    for round_deltas in deltas:
        mean = aggregation.weighted_mean(jnp.asarray(round_deltas), jnp.asarray(weights))
        state = algorithm.server_update(state, {"x": mean}, ())
        steps.append(state.factors["x"])
    return np.array(steps)


@pytest.mark.parametrize("name", GOLDEN)
def test_openfedllm_preset_gives_its_numbers(name):
    weights = np.ones(2) if name in ("fedadagrad", "fedyogi", "fedadam") else WEIGHTS
    # Their numbers have nine digits in float64, ours are float32 near 1.
    np.testing.assert_allclose(server_run(name, OPENFEDLLM, weights), GOLDEN[name], atol=5e-7)


@pytest.mark.parametrize(
    ("name", "last"),
    [("fedyogi", [1.017226114, -0.98165877]), ("fedadam", [1.017242299, -0.981632164])],
)
def test_second_moment_of_the_mean(name, last):
    hyperparameters = OPENFEDLLM._replace(second_moment="d2")
    np.testing.assert_allclose(server_run(name, hyperparameters, np.ones(2))[-1], last, atol=5e-7)


@pytest.mark.parametrize("kind", ["adagrad", "yogi", "adam"])
def test_paper_form_equals_algorithm_2_of_reddi(kind):
    s = Hyperparameters()
    x, m, v = np.array([1.0, -1.0]), np.zeros(2), np.full(2, s.tau**2)
    for deltas in DELTAS:
        mean = WEIGHTS @ deltas / WEIGHTS.sum()
        m = s.beta1 * m + (1 - s.beta1) * mean
        square = mean**2
        if kind == "adagrad":
            m, v = mean, v + square
        elif kind == "yogi":
            v = v - (1 - s.beta2) * square * np.sign(v - square)
        else:
            v = s.beta2 * v + (1 - s.beta2) * square
        x = x + s.adaptive_learning_rate * m / (np.sqrt(v) + s.tau)
    np.testing.assert_allclose(server_run(f"fed{kind}", s)[-1], x, atol=1e-6)


def test_fedavgm_of_hsu():
    s, x, m = Hyperparameters(server_learning_rate=0.5), np.array([1.0, -1.0]), np.zeros(2)
    for deltas in DELTAS:
        m = s.beta1 * m + WEIGHTS @ deltas / WEIGHTS.sum()
        x = x + 0.5 * m
    np.testing.assert_allclose(server_run("fedavgm", s)[-1], x, atol=1e-6)


def test_adamw_hf_is_shorter_where_gradients_are_small():
    # Ten steps of a constant gradient, the way over that of torch's AdamW (from OpenFedLLM's pins).
    for gradient, ratio in ((1e-3, 0.9999), (1e-5, 0.985), (1e-6, 0.874), (1e-7, 0.446)):
        ways = []
        for spec in ("adamw_hf", "adamw(weight_decay=0.0)"):
            optimizer = make_optimizer(spec, clip=0)
            x = jnp.zeros(1)
            state = optimizer.init(x)
            for _ in range(10):
                step, state = optimizer.update(jnp.full(1, gradient), state, x)
                x = optax.apply_updates(x, step)
            ways.append(float(x[0]))
        assert abs(ways[0] / ways[1] - ratio) < 2e-3
