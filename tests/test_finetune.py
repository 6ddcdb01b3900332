"""The Python interface: train on clients' pairs, then generate under the adapter."""

import pytest

import fedsafe_jax as fs
from fedsafe_jax.data.partition import PartitionError

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


def test_a_client_without_pairs_is_named(packaged):
    with pytest.raises(PartitionError, match="client 1 has no pair"):
        fs.finetune(packaged, [PAIRS, [("word " * 500, "yes")]], seq_len=64)
