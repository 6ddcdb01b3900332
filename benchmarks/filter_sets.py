"""How well filters find harmful answers, on several data sets, beside baselines and a torch peer.

    python benchmarks/filter_sets.py --config=configs/filter_minilm.py --workdir=runs/sets \\
        --config.data_dir=DATA --config.encoder=FOLDER [--sets=lab,kosbi] [--kinds=minilm,torch]

For each set and seed, prompts are split; no prompt is on both sides. `minilm` is the configured
encoder, `prompt` the same one that sees no answers, `scratch` a small one without pre-training,
`guard` the packaged language model as a guard, `torch` the encoder fine-tuned by
`torch_classifier.py`, `all` calls everything unsafe. Held-out pairs are resampled to 30% unsafe. On
the lab's data every held-out harmful question also stands with a refusal, by a model, to another
one. `refusals` are safe refusals that are flagged, in percent. Means over seeds with 95% intervals
(bootstrap of seeds and pairs). A cell that was finished is not run again.
"""

import copy
import json
import pathlib
import time

import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags
from rich.console import Console
from rich.table import Table

from fedsafe_jax.data import sources
from fedsafe_jax.data.examples import UNKNOWN, UNSAFE
from fedsafe_jax.data.refusals import start_refusal
from fedsafe_jax.filters import decision, protocol, quality
from fedsafe_jax.filters.pairs import drop_mislabelled, hard_negatives
from fedsafe_jax.models.base_model import model_folder
from fedsafe_jax.pipeline import filtering
from fedsafe_jax.runtime.libraries import prepare_libraries

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config of a filter.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the results.", required=True)
_SETS = flags.DEFINE_list("sets", ["lab", "kosbi", "kosbi_ko", "square"], "Data sets.")
_KINDS = flags.DEFINE_list("kinds", ["all", "prompt", "minilm", "torch", "scratch", "guard"], "")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of split and training.")
_PAIRS = flags.DEFINE_integer("pairs", 2000, "Most training pairs; 0 for all.")

# Sources besides the config's own, and the share of prompts that is held out.
SOURCES = {
    "kosbi": ("kosbi:kosbi/kosbi_valid.json.gz",),
    "kosbi_ko": ("kosbi_ko:kosbi/kosbi_valid.json.gz",),
    "square": ("square:square/response_test_ood.json",),
}
HELD = {"lab": 0.15, "kosbi": 0.3, "kosbi_ko": 0.3, "square": 0.4}
SHARE = 0.3
MEASURES = ("auroc", "precision", "recall", "hmean", "error", "refusals_flagged")
RESAMPLES = 1000


def pairs_of(name, config):
    """Labelled pairs whose label and first words do not contradict each other."""
    names = SOURCES.get(name, config.sources)
    found = [e for n in names for e in sources.load(n, config.data_dir) if e.response]
    known = [e for e in found if e.label != UNKNOWN]
    return drop_mislabelled(known)[0]


def split(name, config, seed):
    """`(training pairs, held-out pairs)`."""
    pairs = pairs_of(name, config)
    learned, held = protocol.split(pairs, 100 + seed, HELD[name])
    order = np.random.default_rng([seed, 16]).permutation(learned)[: _PAIRS.value or None]
    held = [pairs[i] for i in held]
    if name == "lab":  # refusals by models, of held-out questions, to held-out harmful questions
        twins = hard_negatives(held, 1.0, seed)
        held += [e._replace(source="refusal") for e in twins]
    held_unsafe = np.array([e.label == UNSAFE for e in held])
    chosen = quality.resample(held_unsafe, SHARE, seed)
    return [pairs[i] for i in sorted(order)], [held[i] for i in chosen]


def score(name, kind, config, train, held, seed):
    """`(probability [held], threshold)`."""
    if kind == "all":
        return np.full(len(held), SHARE), 0.0
    if kind == "torch":
        return torch_score(config, train, held, seed)
    c = copy.deepcopy(config)
    if name != "lab":  # their answers to a question differ by themselves
        c.hard_negatives = 0.0
    if kind == "prompt":  # an answer that says nothing, since an empty one may mean something
        train = [*train, *hard_negatives(train, c.hard_negatives, seed)]
        train, held = ([e._replace(response="-") for e in side] for side in (train, held))
        c.hard_negatives = 0.0
    if kind in ("scratch", "guard"):
        c.encoder, c.learning_rate, c.epochs = "", 1e-3, 5
    if kind == "guard":
        c.kind, c.model = "guard", "package:model"
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder(c.tokenizer))
    found, _ = filtering.build_filter(
        c,
        train,
        tokenizer,
        seed=seed,
        load_model=filtering.guard_loader(c, None),
        targets=("q_proj", "v_proj"),
    )
    return found.score(held), found.decision.threshold


def torch_score(config, train, held, seed):
    """The peer's probabilities, calibrated as ours."""
    from torch_classifier import TorchClassifier

    peer = TorchClassifier(config.encoder, config.max_length, seed)
    learned, validation = protocol.split(train, seed, config.validation_share)
    unsafe = np.array([e.label == UNSAFE for e in train], int)
    some = [train[i] for i in validation]
    peer.train(
        [train[i] for i in learned], unsafe[learned], some, unsafe[validation],
        config.epochs, config.batch_size, config.learning_rate,
    )  # fmt: skip
    chosen = decision.fit(
        peer.log_odds(some), unsafe[validation], config.target, config.precision_floor,
        config.unsafe_share,
    )  # fmt: skip
    return chosen.probability(peer.log_odds(held)), chosen.threshold


def rates(unsafe, probability, refusal, threshold):
    """The measures of one seed."""
    found = quality.quality(unsafe, probability >= threshold)
    return [
        100 * quality.auroc(unsafe, probability), found.precision, found.recall, found.hmean,
        100 * quality.reliability(unsafe, probability).error,
        100 * float((probability[refusal] >= threshold).mean()) if refusal.any() else 0.0,
    ]  # fmt: skip


def interval(cells):
    """Means `[measures]` and bounds `[2, measures]` over seeds and pairs."""
    rng = np.random.default_rng(0)
    known = [
        (np.array(c["unsafe"], bool), np.array(c["p"]), np.array(c["refusal"]), c["threshold"])
        for c in cells
    ]
    means = np.mean([rates(*k) for k in known], axis=0)
    drawn = np.empty((RESAMPLES, len(means)))
    for i in range(RESAMPLES):
        found = []
        for j in rng.integers(len(known), size=len(known)):
            unsafe, p, refusal, threshold = known[j]
            some = rng.integers(len(p), size=len(p))
            found.append(rates(unsafe[some], p[some], refusal[some], threshold))
        drawn[i] = np.mean(found, axis=0)
    return means, np.percentile(drawn, [2.5, 97.5], axis=0)


def main(argv):
    del argv
    folder, config = pathlib.Path(_WORKDIR.value), _CONFIG.value
    folder.mkdir(parents=True, exist_ok=True)
    prepare_libraries(str(folder))
    logging.set_verbosity(logging.WARNING)
    table = Table(title=f"{100 * SHARE:.0f}% unsafe; mean (95% interval)", title_justify="left")
    for name in (
        "set",
        "filter",
        "AUROC",
        "precision",
        "recall",
        "harmonic mean",
        "calibration",
        "refusals",
    ):
        table.add_column(name)
    out = {}
    for name in _SETS.value:
        for kind in _KINDS.value:
            cells = []
            for seed in map(int, _SEEDS.value):
                path = folder / f"{name}_{kind}_{seed}.json"
                if not path.is_file():
                    started = time.monotonic()
                    train, held = split(name, config, seed)
                    p, threshold = score(name, kind, config, train=train, held=held, seed=seed)
                    cell = {
                        "p": [float(x) for x in p], "threshold": float(threshold),
                        "unsafe": [e.label == UNSAFE for e in held],
                        "refusal": [start_refusal(e.response) for e in held],
                        "trained_on": len(train), "seconds": time.monotonic() - started,
                    }  # fmt: skip
                    path.write_text(json.dumps(cell))
                cells.append(json.loads(path.read_text()))
            means, (low, high) = interval(cells)
            texts = [f"{m:.1f} ({a:.1f}-{b:.1f})" for m, a, b in zip(means, low, high, strict=True)]
            table.add_row(name, kind, *texts)
            out[f"{name}/{kind}"] = {
                "pairs": sum(len(c["p"]) for c in cells),
                "seconds": [round(c["seconds"], 1) for c in cells],
                **dict(zip(MEASURES, np.stack([means, low, high], 1).tolist(), strict=True)),
            }
    Console(width=150).print(table)
    print(json.dumps(out))


if __name__ == "__main__":
    app.run(main)
