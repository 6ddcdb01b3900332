"""Adapter folders of PEFT, intact and with anything in their config or tensors."""

import json
import pathlib
import tempfile

import numpy as np
from fuzzing import fuzzed, refused
from hypothesis import event, given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from fedsafe_jax.models import lora
from fedsafe_jax.models.decoder_config import ModelError

PREFIX = "base_model.model.model.layers"
NAMES = (
    "r lora_alpha target_modules peft_type task_type bias use_dora use_rslora rank_pattern "
    "alpha_pattern modules_to_save init_lora_weights layers_to_transform layers_pattern "
    "fan_in_fan_out lora_dropout inference_mode alora_invocation_tokens megatron_config "
    "trainable_token_indices exclude_modules lora_bias use_qalora something_new"
).split()
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-1, 40),
    st.floats(allow_nan=False, allow_infinity=False, width=16),
    st.sampled_from(["", "LORA", "none", "all", "pissa", "gaussian", "q_proj", "all-linear"]),
    st.lists(st.sampled_from(["q_proj", "v_proj", "lm_head", 0, 1]), max_size=3),
    st.dictionaries(st.sampled_from(["q_proj", "v_proj"]), st.integers(1, 9), max_size=2),
    st.sampled_from(
        [
            float("nan"),
            float("inf"),
            10**400,
            -(10**9),
            "x" * 20_000,
            "\x1b[2J",
            ["../q_proj"],
            [[]],
        ]
    ),
)


def folder_of(folder, config, tensors):
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")


def plain(rank, alpha, seed):
    """Config and tensors of an adapter of q_proj and v_proj in two layers of eight units."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for layer in range(2):
        for name in ("q_proj", "v_proj"):
            stem = f"{PREFIX}.{layer}.self_attn.{name}"
            for letter, shape in (("A", (rank, 8)), ("B", (8, rank))):
                tensors[f"{stem}.lora_{letter}.weight"] = rng.standard_normal(shape, np.float32)
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": ["q_proj", "v_proj"],
    }
    return config, tensors


TENSOR_DAMAGE = (
    "", "missing", "renamed", "cut", "not_finite", "half", "layer_alone", "whole", "huge", "number",
)  # fmt: skip


def damaged(tensors, kind):
    names = sorted(tensors)
    if kind == "missing":
        del tensors[names[0]]
    elif kind == "renamed":
        tensors[names[0].replace("q_proj", "w_proj")] = tensors.pop(names[0])
    elif kind == "cut":
        tensors[names[0]] = np.ascontiguousarray(tensors[names[0]][:-1])
    elif kind == "not_finite":
        tensors[names[0]][0, 0] = np.nan
    elif kind == "whole":
        tensors[names[0]] = tensors[names[0]].astype(np.int32)
    elif kind == "huge":
        tensors[names[0]][0, 0] = 3e38
    elif kind == "number":
        tensors[names[0].replace("layers.0", "layers." + "9" * 5000)] = tensors.pop(names[0])
    elif kind == "half":
        tensors |= {name: t.astype(np.float16) for name, t in tensors.items()}
    elif kind == "layer_alone":
        for name in names:
            if ".1." in name:
                del tensors[name]


@fuzzed
@given(
    rank=st.integers(1, 6),
    alpha=st.integers(1, 32),
    changes=st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=2),
    removed=st.sets(
        st.sampled_from(["r", "lora_alpha", "target_modules", "peft_type"]), max_size=1
    ),
    kind=st.sampled_from(TENSOR_DAMAGE),
)
def test_adapters_are_applied_as_written_or_refused(rank, alpha, changes, removed, kind):
    config, tensors = plain(rank, alpha, seed=rank)
    config = {k: v for k, v in (config | changes).items() if k not in removed}
    damaged(tensors, kind)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        folder_of(folder, config, tensors)
        try:
            adapter = lora.load_adapter(folder)
        except ModelError as error:
            assert changes or removed or kind not in ("", "half"), error
            event("refused")
            refused(error)
            return
    event("accepted")
    # What was accepted is what PEFT computes of it: alpha / r, or alpha / sqrt(r), and the tensors.
    assert kind in ("", "half", "layer_alone")
    assert config["r"] == rank == adapter.config.rank
    root = rank**0.5 if config.get("use_rslora") else rank
    np.testing.assert_allclose(adapter.config.scale, config["lora_alpha"] / root, rtol=1e-6)
    for projection in ("q_proj", "v_proj"):
        pair = adapter.factors["layers"]["self_attn"][projection]
        for letter in "ab":
            for layer, ours in enumerate(np.asarray(pair[letter])):
                stem = f"{PREFIX}.{layer}.self_attn.{projection}.lora_{letter.upper()}.weight"
                np.testing.assert_array_equal(ours.T, tensors[stem].astype(np.float32))
