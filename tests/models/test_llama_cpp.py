"""A GGUF file in llama.cpp itself: the same greedy answers, through its tokenizer and template."""

import pytest

from fedsafe_jax.models import gguf_writer
from fedsafe_jax.models.base_model import model_folder

xllamacpp = pytest.importorskip("xllamacpp")  # .ci/matrix installs it

PROMPTS = [
    "How do I bake bread?", "How do I rob a bank?", "What is  two plus two?\n\nSay it twice.",
    "Write a poem of the sea, please!", "Café — naïve, 12.5%?",
]  # fmt: skip


def test_llama_cpp_answers_alike(packaged, tmp_path):
    path = tmp_path / "model.gguf"
    # In float32: what is compared is the file and its words, not the rounding of a product.
    gguf_writer.write_file(model_folder("package:model"), path, "float32")
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(path), 256, 1
    server = xllamacpp.Server(params)

    def ask(prompt):
        said = server.handle_chat_completions(
            {
                "messages": [{"role": "user", "content": prompt}],
                "max_tokens": 32,
                "temperature": 0.0,
            }
        )
        return said["choices"][0]["message"]["content"]

    answers = packaged.generate(PROMPTS, max_new_tokens=32)
    assert [ask(prompt).strip() for prompt in PROMPTS] == [text.strip() for text in answers]
    assert len(set(answers)) > 2
