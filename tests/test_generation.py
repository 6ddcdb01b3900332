"""Greedy generation against transformers, with left padding and mixed lengths."""

import jax
import numpy as np
import pytest

from fedsafe_jax import generation, language_model
from fedsafe_jax.data import chat

PROMPTS = ("Hello!", "What is the capital of France?", "Write a short poem about the ocean.")


def test_greedy_equals_transformers(tmp_path, packaged):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    language_model.save_pretrained(packaged, tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    prompts = [chat.render(packaged.tokenizer, (("user", p),), True) for p in PROMPTS]
    ours, _ = generation.generate_ids(
        packaged.model, packaged.params, None, prompts, packaged.stop_ids, 20, jax.random.key(0)
    )
    for prompt, found in zip(prompts, ours, strict=True):
        with torch.no_grad():
            out = reference.generate(
                torch.tensor([prompt]), max_new_tokens=20, do_sample=False, pad_token_id=0
            )
        expected = out[0, len(prompt) :].tolist()
        if packaged.tokenizer.eos_token_id in expected:
            expected = expected[: expected.index(packaged.tokenizer.eos_token_id)]
        assert found == expected


def test_batching_does_not_change_answers_and_sampling_follows_the_seed(packaged):
    together = packaged.generate(PROMPTS, max_new_tokens=16)
    assert together == [packaged.generate([p], max_new_tokens=16)[0] for p in PROMPTS]

    def sampled(seed):
        return packaged.generate(PROMPTS, max_new_tokens=16, temperature=1.5, top_k=50, seed=seed)

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)


def test_finished_tells_a_stop_from_a_cut(packaged):
    _, finished = packaged.answer_dialogues([(("user", "Hello!"),)], max_new_tokens=48)
    _, cut = packaged.answer_dialogues([(("user", "Hello!"),)], max_new_tokens=1)
    np.testing.assert_array_equal(finished, [True])
    np.testing.assert_array_equal(cut, [False])
