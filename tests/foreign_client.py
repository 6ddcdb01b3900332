"""What another installation makes of exports; run by its own Python, without this package.

    PYTHON tests/foreign_client.py FOLDER

FOLDER holds `models/NAME` (folders and `tokens.npy`), `chats/NAME` (folders with a tokenizer) and
`adapter`; logits are written beside them, the rest is printed as JSON.
"""

import json
import pathlib
import sys

import numpy as np
import peft
import torch
import transformers
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

MESSAGES = [{"role": "user", "content": "Hello!"}]


def logits(model, tokens):
    """Logits as numpy."""
    with torch.no_grad():
        return model.float().eval()(torch.tensor(tokens)).logits.numpy()


def main(folder: pathlib.Path) -> None:
    """Loads everything, computes, prints."""
    tokens = np.load(folder / "tokens.npy")
    for path in sorted((folder / "models").iterdir()):
        # Eager attention: the one that applies soft caps in Gemma 2.
        model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
        np.save(folder / f"{path.name}.npy", logits(model, tokens))
    chats = {}
    for path in sorted((folder / "chats").iterdir()):
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path)
        text = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
        inputs = tokenizer(text, return_tensors="pt")
        answer = model.float().generate(**inputs, max_new_tokens=12, do_sample=False)
        chats[path.name] = {
            "prompt": text,
            "ids": inputs["input_ids"][0].tolist(),
            "answer": tokenizer.decode(
                answer[0][inputs["input_ids"].shape[1] :], skip_special_tokens=True
            ),
        }
    adapted = AutoPeftModelForCausalLM.from_pretrained(folder / "adapter")
    np.save(folder / "adapter.npy", logits(adapted, tokens))
    versions = {"transformers": transformers.__version__, "peft": peft.__version__}
    print(json.dumps({"versions": versions, "chats": chats}))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
