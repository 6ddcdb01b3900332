"""`vmap` of a flattened function: one call, with the rows of all clients."""

import jax
import jax.numpy as jnp
import numpy as np

from fedsafe_jax.models.flatten_vmap import flatten_vmap

CLIENTS, ROWS, WIDTH = 3, 4, 5


def arrays():
    rng = np.random.default_rng(0)
    weight = jnp.asarray(rng.normal(size=(WIDTH, 2)), jnp.float32)
    return weight, jnp.asarray(rng.normal(size=(2, CLIENTS, ROWS, WIDTH)), jnp.float32)


def recorded():
    """A flattened function of shared weights and two arrays, and the shapes of its calls."""
    shapes = []

    def function(weight, x, y):
        shapes.append(x.shape)
        return {"product": x @ weight["w"], "sum": (x + y).sum(-1)}

    return flatten_vmap(function, num_shared=1), shapes


def expected(weight, x, y):
    return {"product": np.einsum("...i,io->...o", x, weight), "sum": (x + y).sum(-1)}


def assert_close(results, reference):
    # float32 sums over five terms in another order.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), results, reference
    )


def test_one_call_has_the_rows_of_all_clients_and_unmapped_arrays_are_broadcast():
    weight, (x, y) = arrays()
    function, shapes = recorded()
    results = jax.vmap(function, (None, 0, 0))({"w": weight}, x, y)
    assert shapes[-1] == (CLIENTS * ROWS, WIDTH)
    assert_close(results, expected(weight, x, y))
    results = jax.vmap(function, (None, 0, None))({"w": weight}, x, y[0])
    assert_close(results, expected(weight, x, y[0]))


def test_nested_vmaps_are_flattened_into_one():
    weight, (x, y) = arrays()
    function, shapes = recorded()
    several = jax.vmap(jax.vmap(function, (None, 0, None)), (None, 0, 0))
    results = several({"w": weight}, jnp.stack([x, -x]), y[:2])
    assert shapes[-1] == (2 * CLIENTS * ROWS, WIDTH)
    assert_close(results, expected(weight, jnp.stack([x, -x]), y[:2, None]))


def test_mapped_shared_arguments_are_mapped_as_usual():
    weight, (x, y) = arrays()
    function, shapes = recorded()
    weights = jnp.stack([weight, -weight, 2 * weight])
    results = jax.vmap(function)({"w": weights}, x, y)
    assert shapes[-1] == (ROWS, WIDTH)
    for i in range(CLIENTS):
        client = jax.tree.map(lambda leaf, i=i: leaf[i], results)
        assert_close(client, expected(weights[i], x[i], y[i]))
