"""What the mesh refuses."""

import jax
import pytest

from fedsafe_jax.federated import mesh
from fedsafe_jax.models.decoder_config import ModelError


def test_devices_are_shared_out_evenly():
    assert dict(mesh.make_mesh(jax.devices()[:4], 2).shape) == {"clients": 2, "model": 2}
    with pytest.raises(ModelError, match="model_parallel=3 does not divide 4 devices"):
        mesh.make_mesh(jax.devices()[:4], 3)
