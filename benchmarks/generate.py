"""New tokens a second of greedy generation, against transformers' `generate`.

    python benchmarks/generate.py --shape=demo --batch=16 --peer=hf_generate.py

The peer is a script that generates for every prompt, each row to the full length, and prints a JSON
object with `new_tokens_per_s`. Both sides get the same model folder, prompts, batch and number of
new tokens; neither stops early. Runs alternate, so that noise on a shared machine meets both; the
last line is a JSON object of medians, compilation apart.

Shapes are those of `shapes.py`; `1b` and `8b` have random bfloat16 weights and report their share
of the memory bandwidth given by `--gigabytes_per_s` instead of a ratio.
"""

import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import shapes
from absl import app, flags, logging

from fedsafe_jax.federated.mesh import make_mesh, use_cores
from fedsafe_jax.inference import generation
from fedsafe_jax.models.quantize import num_bytes

_SHAPE = flags.DEFINE_enum("shape", "demo", shapes.NAMES, "Which model.")
_PEER = flags.DEFINE_string("peer", None, "The peer's script; none for large shapes.")
_BATCH = flags.DEFINE_integer("batch", 16, "Rows decoded at once.")
_MODEL_PARALLEL = flags.DEFINE_integer(
    "model_parallel", 1, "Devices (CPU: cores) that share one copy of the weights."
)
_NEW = flags.DEFINE_integer("new_tokens", 64, "Of every answer.")
_PROMPTS = flags.DEFINE_integer("prompts", 64, "How many.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed runs of each side.")
_BANDWIDTH = flags.DEFINE_float("gigabytes_per_s", 3350.0, "Of the accelerator (H100 SXM: 3350).")

TOPICS = ("the harbour", "a spreadsheet", "winter tyres", "sourdough", "a choir", "the night sky")
TASKS = (
    "Explain {} to a child in two sentences.",
    "Write a short story about {} and how it changed a small town over many years.",
    "List five facts about {}.",
    "What should I know about {} before I begin, and which mistakes are common?",
)


def prompts() -> list[str]:
    """Prompts of unequal length, in a fixed order."""
    made = [task.format(topic) for topic in TOPICS for task in TASKS]
    return [made[i % len(made)] for i in range(_PROMPTS.value)]


def timer(lm, ids):
    """A function that times one pass over all prompts, and the seconds of its first call."""

    def run():
        started = time.perf_counter()
        generation.generate_ids(
            lm.model,
            lm.params,
            None,
            prompts=ids,
            stop_ids=(-1,),
            max_new_tokens=_NEW.value,
            batch_size=_BATCH.value,
            mesh=lm.mesh,
        )
        return time.perf_counter() - started

    first = run()
    return run, first


def peer_speed(folder: pathlib.Path, texts: list[str]) -> float:
    """New tokens a second of the peer."""
    file = folder / "prompts.txt"
    file.write_text("\n".join(texts) + "\n")
    command = [sys.executable, _PEER.value, "--model", str(folder), "--prompts", str(file)]
    command += ["--batch", str(_BATCH.value), "--new-tokens", str(_NEW.value)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])["new_tokens_per_s"]


def main(argv):
    del argv
    logging.set_verbosity(logging.WARNING)
    if _SHAPE.value not in shapes.LARGE and not _PEER.value:
        raise app.UsageError("--peer: give the script to compare with.")
    use_cores(_BATCH.value)
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        mesh = make_mesh(model_parallel=_MODEL_PARALLEL.value)
        lm, texts = shapes.model(_SHAPE.value, folder, mesh), prompts()
        # As the peer reads them: without a chat template.
        ids = [lm.tokenizer(text)["input_ids"] for text in texts]
        run, first = timer(lm, ids)
        new_tokens = len(ids) * _NEW.value
        ours, peers = [], []
        for _ in range(_REPEATS.value):
            ours.append(new_tokens / run())
            if _PEER.value and _SHAPE.value not in shapes.LARGE:
                peers.append(peer_speed(folder, texts))
    middle = statistics.median(ours)
    result = {
        "new_tokens_per_s": round(middle, 1),
        "all": [round(v) for v in ours],
        "compile_s": round(first - new_tokens / middle, 1),
        "parameters": sum(x.size for x in jax.tree.leaves(lm.params)),
        "batch": _BATCH.value,
        "model_parallel": _MODEL_PARALLEL.value,
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }
    if peers:
        peer = statistics.median(peers)
        result |= {"peer_new_tokens_per_s": peer, "peer_all": [round(v) for v in peers]}
        result |= {"ratio": round(middle / peer, 2)}
    else:
        # Every step reads all weights once; the cache is small beside them.
        read = num_bytes(lm.params) * (middle / _BATCH.value) / 1e9
        result |= {"share_of_bandwidth": round(read / _BANDWIDTH.value, 3)}
    print(json.dumps(result))


if __name__ == "__main__":
    app.run(main)
