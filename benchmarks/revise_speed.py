"""Answers, critiques and revisions a second, against the same steps with transformers' `generate`.

    python benchmarks/revise_speed.py [--model=FOLDER] [--prompts=SOURCE --data_dir=DATA] --batch=32

Both sides run the loop of `fedsafe_jax.cai.revise` greedily, with the same model, prompts,
principles and longest answer; only what generates differs. Runs alternate; medians, compilation
apart; the last line is a JSON object.
"""

import json
import os
import statistics
import time

import jax
from absl import app, flags

from fedsafe_jax import load_pretrained
from fedsafe_jax.cai import constitution, forms, revise
from fedsafe_jax.data import sources
from fedsafe_jax.federated.mesh import make_mesh, use_cores
from fedsafe_jax.inference.chat_session import ChatSession
from fedsafe_jax.models.base_model import model_folder
from fedsafe_jax.pipeline.constitutional import make_generate_fn

_MODEL = flags.DEFINE_string("model", "package:model", "Model folder or Hub id.")
_PROMPTS = flags.DEFINE_string("prompts", "chat:package/cai_red_team.jsonl", "Source.")
_DATA_DIR = flags.DEFINE_string("data_dir", "", "Folder of the source.")
_COUNT = flags.DEFINE_integer("count", 64, "Prompts.")
_BATCH = flags.DEFINE_integer("batch", 32, "Rows generated at once.")
_NEW = flags.DEFINE_integer("max_new_tokens", 48, "Of an answer, critique or revision.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed runs of each side.")


def torch_speaker(folder):
    """Answers threads with transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def say(threads, call):
        del call
        texts, finished = [], []
        for start in range(0, len(threads), _BATCH.value):
            some = threads[start : start + _BATCH.value]
            chats = [[{"role": r, "content": t} for r, t in forms.as_chat(x)] for x in some]
            rendered = [
                tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True)
                for c in chats
            ]
            batch = tokenizer(rendered, return_tensors="pt", padding=True, add_special_tokens=False)
            out = model.generate(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                do_sample=False, max_new_tokens=_NEW.value, pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
            new = out[:, batch["input_ids"].shape[1] :]
            texts += [t.strip() for t in tokenizer.batch_decode(new, skip_special_tokens=True)]
            finished += (new == tokenizer.eos_token_id).any(1).tolist()
        return texts, finished

    return say


def main(argv):
    del argv
    examples = sources.load(_PROMPTS.value, _DATA_DIR.value)
    prompts = [e.messages for e in examples[: _COUNT.value]]
    use_cores(os.cpu_count())
    lm = load_pretrained(_MODEL.value, mesh=make_mesh())

    def ours(threads, call):  # a conversation of its own for every run
        nonlocal talk
        if call == 0:
            talk = ChatSession(lm, _BATCH.value)
        return make_generate_fn(_NEW.value, (0,), talk, temperature=0.0)(threads, call)

    talk = None
    theirs = torch_speaker(model_folder(_MODEL.value))
    principles = constitution.load("package:constitution")

    def timed(say):
        started = time.perf_counter()
        found = revise.revise(prompts, principles, say, reviser=say, seed=(0,))
        return time.perf_counter() - started, found

    first, mine = timed(ours)
    _, other = timed(theirs)
    same = sum(a.revision == b.revision for a, b in zip(mine, other, strict=True))
    tokens = sum(
        len(lm.tokenizer(text)["input_ids"])
        for r in mine
        for text in (r.initial, r.critique, r.revision)
    )
    found = [(timed(ours)[0], timed(theirs)[0]) for _ in range(_REPEATS.value)]
    mine_s, other_s = (statistics.median(side) for side in zip(*found, strict=True))
    print(
        json.dumps(
            {
                "prompts_per_s": round(len(prompts) / mine_s, 2),
                "peer_prompts_per_s": round(len(prompts) / other_s, 2),
                "tokens_per_s": round(tokens / mine_s, 1),
                "ratio": round(other_s / mine_s, 2),
                "compile_s": round(first - mine_s, 1),
                "same_revisions": f"{same} of {len(prompts)}",
                "all_s": [[round(s, 2) for s in side] for side in zip(*found, strict=True)],
                "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            }
        )
    )


if __name__ == "__main__":
    app.run(main)
