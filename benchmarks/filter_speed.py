"""Pairs a second that an encoder scores, against the same encoder in transformers on torch.

    python benchmarks/filter_speed.py --encoder=FOLDER --data_dir=DATA

Both tokenise and score the same pairs in the same batch size; the peer pads each batch to its
longest pair, as transformers does, ours sorts by length first. Runs alternate; medians, compilation
apart; the last line is a JSON object.
"""

import dataclasses
import json
import pathlib
import statistics
import time

import jax
import numpy as np
from absl import app, flags

from fedsafe_jax.data import sources
from fedsafe_jax.filters import classifier
from fedsafe_jax.models import encoder_hub

_ENCODER = flags.DEFINE_string(
    "encoder", None, "BERT, RoBERTa or ModernBERT folder.", required=True
)
_SOURCE = flags.DEFINE_string("source", "dolly:dolly/databricks_dolly_sample.csv", "Pairs.")
_DATA_DIR = flags.DEFINE_string("data_dir", "", "Folder of the data.")
_PAIRS = flags.DEFINE_integer("pairs", 512, "How many.")
_BATCH = flags.DEFINE_integer("batch", 32, "Rows of the longest width, and of the peer's batches.")
_LENGTH = flags.DEFINE_integer("max_length", 128, "Tokens of a pair.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed runs of each side.")


def main(argv):
    del argv
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    pairs = [e for e in sources.load(_SOURCE.value, _DATA_DIR.value) if e.response]
    pairs = pairs[: _PAIRS.value]
    tokenizer = AutoTokenizer.from_pretrained(_ENCODER.value)
    config, params = encoder_hub.load_classifier(pathlib.Path(_ENCODER.value), num_labels=2)
    config = dataclasses.replace(config, dropout=0.0)
    ours = classifier.ClassifierFilter(config, params, tokenizer, _LENGTH.value)
    classifier.BATCH_TOKENS = _BATCH.value * _LENGTH.value
    theirs = AutoModelForSequenceClassification.from_pretrained(_ENCODER.value, num_labels=2).eval()
    lengths = [len(r.ids) for r in classifier.encode_pairs(tokenizer, pairs, _LENGTH.value)]

    @torch.inference_mode()
    def peer():
        for start in range(0, len(pairs), _BATCH.value):
            some = pairs[start : start + _BATCH.value]
            batch = tokenizer(
                [e.prompt for e in some], [e.response for e in some], padding=True,
                truncation=True, max_length=_LENGTH.value, return_tensors="pt",
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
