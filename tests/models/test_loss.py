"""The chunked loss against the plain formula."""

import jax
import jax.numpy as jnp
import numpy as np
from conftest import tiny_config

from fedsafe_jax.models import loss
from fedsafe_jax.models.decoder import Decoder


def test_chunked_nll_and_gradient_equal_the_plain_formula(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_TOKENS", 8)  # several chunks, one of them without targets
    config = tiny_config()
    model = Decoder(config)
    blank = jnp.zeros((1, 4), jnp.int32)
    params = model.init(jax.random.key(0), blank, blank, blank)["params"]
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(3, 13, 32)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 97, (3, 13)), jnp.int32)
    mask = jnp.asarray(rng.random((3, 13)) < 0.4, jnp.float32)

    def ours(h):
        return (loss.token_nll(model, params, h, targets, mask) ** 2).sum()

    def plain(h):
        logits = h @ params["embed_tokens"].T
        log_p = jax.nn.log_softmax(logits)
        nll = -jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]
        return ((nll * mask) ** 2).sum()

    # float32 sums over 97 logits in another order.
    np.testing.assert_allclose(ours(hidden), plain(hidden), rtol=1e-5)
    np.testing.assert_allclose(jax.grad(ours)(hidden), jax.grad(plain)(hidden), atol=1e-4)
