"""Pairs a second that an encoder scores, against the same encoder in transformers on torch.

    python benchmarks/filter_speed.py --config=configs/filter_minilm.py \\
        --config.encoder=FOLDER --config.data_dir=DATA

Both tokenise and score the same pairs, drawn from the config's sources, in the same batch size; the
peer pads each batch to its longest pair, as transformers does, ours sorts by length first and gives
each core, or accelerator, batches of its own. Runs alternate; medians, compilation apart; the last
line is a JSON object.
"""

import dataclasses
import json
import os
import pathlib
import statistics
import time

import jax
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from fedsafe_jax.data import sources
from fedsafe_jax.federated.mesh import use_cores
from fedsafe_jax.filters import classifier
from fedsafe_jax.models import encoder_hub

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config of a filter.", lock_config=True)
_PAIRS = flags.DEFINE_integer("pairs", 512, "How many.")
_BATCH = flags.DEFINE_integer("batch", 32, "Rows of the longest width, and of the peer's batches.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed runs of each side.")


def main(argv):
    del argv
    use_cores(os.cpu_count())
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    c = _CONFIG.value
    pairs = [e for name in c.sources for e in sources.load(name, c.data_dir) if e.response]
    order = np.random.default_rng(0).permutation(len(pairs))[: _PAIRS.value]
    pairs = [pairs[i] for i in order]
    tokenizer = AutoTokenizer.from_pretrained(c.encoder)
    config, params = encoder_hub.load_classifier(pathlib.Path(c.encoder), num_labels=2)
    config = dataclasses.replace(config, dropout=0.0)
    ours = classifier.ClassifierFilter(config, params, tokenizer, max_length=c.max_length)
    classifier.BATCH_TOKENS = _BATCH.value * c.max_length
    theirs = AutoModelForSequenceClassification.from_pretrained(c.encoder, num_labels=2).eval()
    lengths = [len(r.ids) for r in classifier.encode_pairs(tokenizer, pairs, c.max_length)]

    @torch.inference_mode()
    def peer():
        for start in range(0, len(pairs), _BATCH.value):
            some = pairs[start : start + _BATCH.value]
            batch = tokenizer(
                [e.dialogue for e in some], [e.response for e in some], padding=True,
                truncation=True, max_length=c.max_length, return_tensors="pt",
            )  # fmt: skip
            theirs(**batch)

    def seconds(run):
        started = time.perf_counter()
        run()
        return time.perf_counter() - started

    first = seconds(lambda: ours.log_odds(pairs))
    peer()
    found = [(seconds(lambda: ours.log_odds(pairs)), seconds(peer)) for _ in range(_REPEATS.value)]
    mine, other = (statistics.median(side) for side in zip(*found, strict=True))
    print(
        json.dumps(
            {
                "pairs_per_s": round(len(pairs) / mine, 1),
                "peer_pairs_per_s": round(len(pairs) / other, 1),
                "ratio": round(other / mine, 2),
                "compile_s": round(first - mine, 1),
                "mean_tokens": round(float(np.mean(lengths)), 1),
                "all_s": [[round(s, 2) for s in side] for side in zip(*found, strict=True)],
                "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            }
        )
    )


if __name__ == "__main__":
    app.run(main)
