"""Config files of models with anything in any field: read as they are, or refused in one line."""

import json
import pathlib
import tempfile
import time

from fuzzing import fuzzed, refused
from hypothesis import given
from hypothesis import strategies as st

from fedsafe_jax.models import base_model, encoder_hub, hub
from fedsafe_jax.models.config_fields import DECODER_FIELDS, ENCODER_FIELDS, HARMLESS
from fedsafe_jax.models.decoder_config import ModelError

PACKAGED = json.loads((base_model.PACKAGED_FOLDER / "config.json").read_text())
BERT = {
    "model_type": "bert", "vocab_size": 50, "hidden_size": 8, "num_hidden_layers": 1,
    "num_attention_heads": 2, "intermediate_size": 8, "max_position_embeddings": 16,
}  # fmt: skip
FAMILIES = sorted(DECODER_FIELDS) + sorted(ENCODER_FIELDS) + ["none", 7, None, ["llama"]]
FIELDS = sorted({"something_new"} | HARMLESS.union(*DECODER_FIELDS.values()))
ENCODER = sorted({"num_labels"}.union(*ENCODER_FIELDS.values()))
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 64)
    | st.floats(width=16)
    | st.sampled_from((10**7, 10**9, 10**12, 10**400, 1e300, "4", "gelu", "\x1b[2J", "x" * 9999)),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(("rope_type", "rope_theta", "factor", "full_attention", "0")),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)


def read_or_refused(content, read):
    """Asserts that a config is read, or refused in one line, soon."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        (folder / "config.json").write_text(json.dumps(content))
        start = time.monotonic()
        try:
            read(folder)
        except ModelError as error:
            refused(error)
        assert time.monotonic() - start < 20


@fuzzed
@given(
    st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=3),
    st.sampled_from(FAMILIES) | st.just("llama"),
)
def test_configs_of_decoders(changes, family):
    read_or_refused(PACKAGED | {"model_type": family} | changes, hub.read_config)


@fuzzed
@given(
    st.dictionaries(st.sampled_from(ENCODER), VALUES, max_size=3),
    st.sampled_from(sorted(ENCODER_FIELDS)),
)
def test_configs_of_encoders(changes, family):
    read_or_refused(BERT | {"model_type": family} | changes, encoder_hub.read_config)


@fuzzed
@given(VALUES)
def test_indexes_of_weights(value):
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        (folder / hub.INDEX).write_text(json.dumps({"weight_map": value}))
        try:
            hub.Tensors(folder)
        except ModelError as error:
            refused(error)
        else:
            raise AssertionError("no file is there")
