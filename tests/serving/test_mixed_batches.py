"""Several adapters in one batch: each row's answer is that of its adapter alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedsafe_jax import load_pretrained
from fedsafe_jax.federated.mesh import make_mesh
from fedsafe_jax.inference.sampling import Sampling
from fedsafe_jax.models import adapter_stack, lora, owned_lora
from fedsafe_jax.serving.served_models import Draw, ServedModels

TEXTS = ("How do I bake bread?", "Hello!", "A cake needs flour, eggs and patience.", "Why? " * 9)


def adapter(config, seed, rank, alpha, targets):
    shape = lora.LoraConfig(rank, alpha, targets)
    factors = lora.init(jax.random.key(seed), config, shape)
    noise = np.random.default_rng(seed)
    factors = jax.tree.map(lambda x: x + 0.1 * noise.normal(size=x.shape).astype("f"), factors)
    return lora.Adapter(factors, shape)


@pytest.fixture(scope="module")
def adapters(packaged):
    """Of other ranks, scales and projections."""
    config = packaged.config
    return {
        "a": adapter(config, 1, 2, 4.0, ("q_proj", "v_proj")),
        "b": adapter(config, 2, 3, 9.0, ("q_proj", "down_proj")),
    }


def test_products_are_those_of_each_owner(packaged, adapters):
    factors, scale = adapter_stack.stack(list(adapters.values()))
    rng = np.random.default_rng(0)
    for block, name in (("self_attn", "q_proj"), ("self_attn", "v_proj"), ("mlp", "down_proj")):
        pair = {key: leaf[1] for key, leaf in factors["layers"][block][name].items()}
        x = rng.normal(size=(2, 3, pair["a"].shape[1])).astype(np.float32)
        owner = np.array([[0, 1, -1], [1, 0, 0]], np.int32)
        got = scale * np.asarray(owned_lora.product(x, **pair, owner=owner), np.float64)
        for place in np.ndindex(2, 3):
            expected = np.zeros(got.shape[-1])
            if owner[place] >= 0:
                one = list(adapters.values())[owner[place]]
                own = one.factors["layers"].get(block, {}).get(name)
                if own is not None:
                    a, b = (np.asarray(own[key][1], np.float64) for key in "ab")
                    expected = one.config.scale * (x[place] @ a @ b)
            # Sums of float32 in another order; values are of order 1.
            np.testing.assert_allclose(got[place], expected, atol=1e-5)


def test_answers_are_those_of_one_adapter_alone(adapters):
    """On two devices, sampled: neither the row nor the neighbours change what is drawn."""
    lm = load_pretrained("package:model", mesh=make_mesh(jax.devices()[:2]))
    served, sampling = ServedModels(lm, "base", adapters), Sampling(0.9)
    names = ["a", "base", "b", "a", "b", "base", "b"]
    rows = [served.encode(TEXTS[i % len(TEXTS)]) for i in range(len(names))]
    draws = [Draw(ids, 12, 5, place=i) for i, ids in enumerate(rows)]
    *_, mixed = served.generate(names, sampling, draws)
    for name in ("base", "b"):
        mine = [i for i, given in enumerate(names) if given == name]
        *_, alone = served.generate([name] * len(mine), sampling, [draws[i] for i in mine])
        # Products are summed in another order, by which none of these draws is decided.
        assert [mixed[i][0] for i in mine] == [ids for ids, _ in alone]
    one = Draw(rows[0], 12, 5, place=0)
    *_, told = served.generate(["a", "base", "b"], sampling, [one] * 3)
    assert len({tuple(ids) for ids, _ in told}) == 3  # the adapters do differ


def test_an_adapter_that_is_no_number_answers_alone(packaged, adapters):
    broken = jax.tree.map(lambda x: x * jnp.nan, adapters["a"].factors)
    served = ServedModels(
        packaged, "base", adapters | {"broken": adapters["a"]._replace(factors=broken)}
    )
    assert served.group("a") == served.group("base") != served.group("broken") == "broken"
