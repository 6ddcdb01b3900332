"""The Python interface: train on clients' pairs, then generate under the adapter."""

import json

import jax
import numpy as np
import pytest

import fedsafe_jax as fs
from fedsafe_jax import validation
from fedsafe_jax.data import chat
from fedsafe_jax.data.partition import PartitionError
from fedsafe_jax.federated import aggregation, algorithms, compression
from fedsafe_jax.finetune import adapters_by_step
from fedsafe_jax.models import lora
from fedsafe_jax.models.hub import ModelError
from fedsafe_jax.registry import UnknownNameError

PAIRS = [("What is your favourite fruit?", "Bananas."), ("Which fruit do you like?", "Bananas.")]


def test_an_adapter_learns_what_all_clients_hold_and_is_reproducible(packaged):
    options = {"rounds": 4, "local_steps": 8, "batch_size": 2, "learning_rate": 8e-3, "seq_len": 64}
    adapter = fs.finetune(packaged, [PAIRS[:1], PAIRS[1:], PAIRS], rank=4, **options)
    assert packaged.generate([PAIRS[0][0]], max_new_tokens=8) != ["Bananas."]
    adapted = packaged.with_adapter(adapter)
    assert adapted.generate([p for p, _ in PAIRS], max_new_tokens=8) == ["Bananas."] * 2
    again = fs.finetune(packaged, [PAIRS[:1], PAIRS[1:], PAIRS], rank=4, **options)
    leaf = ("layers", "self_attn", "q_proj", "b")
    first, second = adapter.factors, again.factors
    for key in leaf:
        first, second = first[key], second[key]
    assert (first == second).all()


def loss_of(lm, pairs):
    """Nats an answer token in numpy, from the logits of each pair alone."""
    nats = []
    for prompt, response in pairs:
        one = chat.encode(lm.tokenizer, (("user", prompt),), response, 64)
        logits = np.asarray(lm(np.asarray(one.ids)[None]), np.float64)[0, :-1]
        logits -= logits.max(-1, keepdims=True)
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        own = -logs[np.arange(len(logs)), np.asarray(one.ids)[1:]]
        nats.extend(own[np.asarray(one.loss_mask)[1:] > 0])
    return np.mean(nats)


def test_an_adapter_is_trained_on_and_by_several_numbers_of_steps(packaged):
    """Losses against numpy; the adapter of two of four steps against a training of two."""
    config = fs.LoraConfig(2, 4.0, ("q_proj", "v_proj"))
    factors = lora.init(jax.random.key(0), packaged.config, config)
    factors = jax.tree.map(lambda x: x + 0.1, factors)  # `b` of a fresh one is zero
    released = packaged.with_adapter(fs.Adapter(factors, config))
    options = {"start": "adapter", "batch_size": 2, "seq_len": 64, "learning_rate": 8e-3}
    adapters, losses = adapters_by_step(released, PAIRS, [2, 4], **options)
    assert losses.shape == (4,) and losses[3] < losses[1] < losses[0]
    # float32 logits; sums over a packed row are in another order.
    np.testing.assert_allclose(losses[0], loss_of(released, PAIRS), rtol=1e-4)
    two = packaged.with_adapter(adapters[0])
    np.testing.assert_allclose(losses[2], loss_of(two, PAIRS), rtol=1e-4)
    assert abs(losses[0] / loss_of(packaged, PAIRS) - 1) > 1e-2

    again = fs.finetune(released, [PAIRS], rounds=1, local_steps=2, **options)
    assert again.config == config == adapters[1].config
    # Programs of two lengths may add up in another order, and Adam divides by what may be tiny.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), again.factors, two.factors
    )


def test_what_becomes_of_an_adapter_is_said(packaged):
    config = fs.LoraConfig(2, 4.0, ("v_proj", "q_proj"))
    factors = lora.init(jax.random.key(0), packaged.config, config)
    released = packaged.with_adapter(fs.Adapter(factors, config))
    for lm, options, message in (
        (released, {}, "start: there is an adapter on the model; say 'adapter' .* or 'fresh'"),
        (released, {"start": "new"}, "start='new': expected 'fresh' or 'adapter'"),
        (packaged, {"start": "adapter"}, "start='adapter': there is no adapter on the model"),
        (released, {"start": "adapter", "rank": 3}, "rank=3: the adapter .* has 2; leave it out"),
        (released, {"start": "adapter", "targets": ["k_proj"]}, "targets=.*has .*'q_proj'"),
    ):
        with pytest.raises(ModelError, match=message):
            fs.finetune(lm, [PAIRS], **options)


def test_a_client_without_pairs_is_named(packaged):
    with pytest.raises(PartitionError, match="client 1 has no pair"):
        fs.finetune(packaged, [PAIRS, []], seq_len=64)
    # Long prompts are shortened; a row that is shorter than a dialogue's headers holds none.
    with pytest.raises(PartitionError, match="client 0 has no pair whose prompt fits into 2"):
        fs.finetune(packaged, [PAIRS], seq_len=2)


@pytest.mark.parametrize(
    ("clients", "options", "message"),
    [
        ([PAIRS], {"algorithm": "fedavgg"}, "algorithm: 'fedavgg' is not one of .*'fedavg"),
        ([PAIRS], {"rank": 0}, "rank=0: expected a whole number, at least 1"),
        ([PAIRS], {"rank": 2.5}, "rank=2.5: expected a whole number"),
        ([PAIRS], {"rounds": 0}, "rounds=0: expected"),
        ([PAIRS], {"rounds": "3"}, "rounds='3': expected"),
        ([PAIRS], {"local_steps": 0}, "local_steps=0: expected"),
        ([PAIRS], {"batch_size": -1}, "batch_size=-1: expected"),
        ([PAIRS], {"clients_per_round": 0}, "clients_per_round=0: expected"),
        ([PAIRS], {"clients_per_round": 2}, "clients_per_round=2 exceeds the 1 clients"),
        ([], {}, "clients: no client is given"),
        ([PAIRS, []], {}, "client 1 has no pair"),
        ([PAIRS, "How?"], {}, "client 1 is a text"),
        ([PAIRS, ["How?"]], {}, "client 1, pair 0: expected .* not 'How"),
        ([[("How?", None)]], {}, "client 0, pair 0: expected"),
        ([PAIRS], {"targets": ("q_prj",)}, "q_prj"),
    ],
)
def test_wrong_arguments_are_one_line_before_any_compute(packaged, clients, options, message):
    with pytest.raises(validation.input_errors(), match=message) as caught:
        fs.finetune(packaged, clients, **options)
    assert "\n" not in str(caught.value)


def test_names_that_no_registry_has():
    for make in (algorithms.make, aggregation.make, compression.make):
        arguments = (None, 2) if make is algorithms.make else ()
        with pytest.raises(UnknownNameError, match="'fedavgg' is not one of"):
            make("fedavgg", *arguments)
    with pytest.raises(UnknownNameError, match="Did you mean 'multi_krum'?"):
        aggregation.make("multikrum")
    assert UnknownNameError in validation.input_errors()


def test_a_dtype_that_is_none():
    with pytest.raises(ModelError, match="dtype='float3': expected one of float32"):
        fs.load_pretrained("package:model", dtype="float3")


def test_a_model_is_not_saved_in_a_dtype_that_is_none(packaged, tmp_path):
    with pytest.raises(ModelError, match="dtype='int4'"):
        fs.save_pretrained(packaged, tmp_path / "saved", dtype="int4")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ("How do I bake bread?", {}, "prompts: one text is given; expected a list"),
        ([{"role": "user", "content": "x"}], {}, r"prompts\[0\]: expected a text, not {'role'"),
        (["x"], {"max_tokens": 8}, "no option 'max_tokens'; .*Did you mean 'max_new_tokens'"),
        (["x"], {"num_adapters": 2}, "no option 'num_adapters'"),
    ],
)
def test_wrong_prompts_and_options_are_named(packaged, prompts, options, message):
    with pytest.raises(ModelError, match=message):
        packaged.generate(prompts, **options)
    with pytest.raises(ModelError, match=message):
        packaged.sample(prompts, n=2, **options)
    with pytest.raises(ModelError, match=message):
        packaged.generate_each(None, prompts, **options)


def test_dropout_is_reproducible_saved_and_off_by_default(packaged, tmp_path):
    options = {"rounds": 1, "local_steps": 2, "batch_size": 1, "seq_len": 32, "rank": 2}
    options |= {"learning_rate": 1e-2}

    def trained(**more):
        adapter = fs.finetune(packaged, [PAIRS[:1], PAIRS[1:]], **options, **more)
        return adapter, np.asarray(adapter.factors["layers"]["self_attn"]["q_proj"]["b"])

    plain, off = trained()[1], trained(dropout=0.0)[1]
    adapter, dropped = trained(dropout=0.5)
    np.testing.assert_array_equal(plain, off)
    np.testing.assert_array_equal(trained(dropout=0.5)[1], dropped)
    # One client after the other, not the rows of both as one queue: the same is dropped.
    alone = trained(dropout=0.5, clients_in_parallel=1)[1]
    np.testing.assert_allclose(alone, dropped, atol=1e-3 * np.abs(dropped).max())
    assert np.abs(dropped - plain).max() > 1e-2 * np.abs(plain).max() > 0
    fs.save_adapter(adapter, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_dropout"] == 0.5
    assert fs.load_adapter(tmp_path).config.dropout == 0.5


@pytest.mark.parametrize("dropout", [-0.1, 1.0, float("nan")])
def test_a_dropout_that_is_no_share_is_named(packaged, dropout):
    with pytest.raises(ModelError, match="dropout="):
        fs.finetune(packaged, [PAIRS], dropout=dropout)
