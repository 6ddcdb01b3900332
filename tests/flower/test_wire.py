"""Messages between server and sites: arrays and configs come out as they went in."""

import json

import numpy as np
import pytest

pytest.importorskip("flwr")

from fedsafe_jax.config import default_config  # noqa: E402
from fedsafe_jax.flower import wire  # noqa: E402


def test_configs_travel_unchanged():
    config = default_config()
    config.seeds, config.filter.action = (3,), "mask"
    received = wire.config_of(wire.config_record(config))
    assert json.dumps(received.to_dict()) == json.dumps(config.to_dict())


def test_arrays_travel_by_name():
    tree = {"adapter": {"q": {"a": np.arange(6, dtype=np.float32).reshape(2, 3)}}, "control": ()}
    record = wire.arrays(tree)
    assert list(record) == ["adapter.q.a"]
    unpacked = wire.tree(record, tree)
    np.testing.assert_array_equal(unpacked["adapter"]["q"]["a"], tree["adapter"]["q"]["a"])
    assert unpacked["control"] == ()


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        ({}, "array q is missing"),
        ({"q": np.zeros((2, 3), np.float32), "k": np.zeros(1, np.float32)}, "array k is not known"),
        ({"q": np.zeros((2, 4), np.float32)}, r"float32 \[2, 4\], expected float32 \[2, 3\]"),
        ({"q": np.zeros((2, 3), np.float64)}, r"float64 \[2, 3\], expected float32 \[2, 3\]"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_by_name(sent, message):
    with pytest.raises(wire.WireError, match=message):
        wire.tree(wire.arrays(sent), {"q": np.zeros((2, 3), np.float32)})
