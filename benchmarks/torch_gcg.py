"""The peer of `gcg.py`: nanogcg's search on the same model, request and target.

    PYTHON benchmarks/torch_gcg.py INPUT.json

PYTHON has nanogcg 0.3 and the newest transformers that it takes, 4.47. Prints a JSON object:
`losses` of the suffixes given, and `seconds` of each step.
"""

import json
import pathlib
import sys
import time

import nanogcg
import torch
from nanogcg import gcg
from transformers import AutoModelForCausalLM, AutoTokenizer


class Timed(gcg.GCG):
    """Notes when each step begins, and reads the tokens given around a suffix."""

    def __init__(self, around, *arguments):
        super().__init__(*arguments)
        self.around, self.began = around, []

    def init_buffer(self):
        """Puts the tokens given in the place of its own, which lack a first control token."""
        before, after, target = (torch.tensor([ids]) for ids in self.around)
        embed = self.embedding_layer
        self.target_ids, self.before_embeds = target, embed(before)
        self.after_embeds, self.target_embeds = embed(after), embed(target)
        with torch.no_grad():
            output = self.model(inputs_embeds=self.before_embeds, use_cache=True)
        self.prefix_cache = output.past_key_values
        return super().init_buffer()

    def compute_token_gradient(self, *arguments):
        self.began.append(time.perf_counter())
        return super().compute_token_gradient(*arguments)


def main(given: dict) -> dict:
    """Searches, and scores the suffixes given."""
    torch.set_num_threads(given["threads"])
    tokenizer = AutoTokenizer.from_pretrained(given["model"])
    tokenizer.chat_template = given["template"]
    model = AutoModelForCausalLM.from_pretrained(given["model"], torch_dtype=torch.float32)
    config = nanogcg.GCGConfig(
        num_steps=given["steps"] + 1,  # the first one warms up
        search_width=given["candidates"],
        batch_size=given["chunk"],
        topk=given["top_k"],
        buffer_size=given["buffer"],
        filter_ids=False,  # as many are scored, whatever the tokenizer makes of them
        seed=0,
        verbosity="ERROR",
    )
    search = Timed(given["around"], model.eval(), tokenizer, config)
    search.run(given["messages"], given["target"])
    ended = time.perf_counter()
    began = search.began[1:]
    seconds = [b - a for a, b in zip(began, [*began[1:], ended], strict=True)]
    ids = torch.tensor(given["ids"])
    embeds = torch.cat(
        [
            search.embedding_layer(ids),
            search.after_embeds.repeat(len(ids), 1, 1),
            search.target_embeds.repeat(len(ids), 1, 1),
        ],
        dim=1,
    )
    with torch.no_grad():
        losses = search._compute_candidates_loss_original(len(ids), embeds)
    return {"losses": losses.tolist(), "seconds": seconds}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(pathlib.Path(sys.argv[1]).read_text()))))
