"""Judges of refusal against human labels, on the answers of each model, as one table.

    python benchmarks/judges.py --data_dir=DATA [--encoder=FOLDER] [--judges=SPEC,...] [--counts]

`rules`, `start` and `keyword`; the GPT-4 labels of XSTest's own files; and with --encoder a
classifier for each of the two models, trained as `fedsafe train-judge` does on the *other* model's
answers alone. The prompts of both files are the same, so three more rows say what that is worth: a
classifier that reads nothing but the request; one that reads nothing but the answer; and one that
was trained on half of the prompts and is measured on the other half, both ways, so that it has seen
neither the model nor the prompt. `--counts` writes the packaged counts of the judges without a
model. The last line is a JSON object.
"""

import csv
import functools
import json
import pathlib

import numpy as np
from absl import app, flags

from fedsafe_jax import whole_files
from fedsafe_jax.cli.train_judge import MEANINGS, shown
from fedsafe_jax.data import labelled_answers
from fedsafe_jax.data.labelled_answers import LabelledAnswer
from fedsafe_jax.evals import calibration, judge_training, judges
from fedsafe_jax.evals.judges import Answered
from fedsafe_jax.evals.judges.classifier import Head
from fedsafe_jax.filters.training import TrainingOptions
from fedsafe_jax.models import encoder_hub
from fedsafe_jax.runtime.libraries import prepare_libraries

FILES = {
    "llama2": "xstest_labels/xstest_v2_completions_llama2new_gpteval.csv",
    "mistral": "xstest_labels/xstest_v2_completions_mistralinstruct_gpteval.csv",
}
_DATA = flags.DEFINE_string("data_dir", None, "Folder of the label files.", required=True)
_ENCODER = flags.DEFINE_string("encoder", "", "Encoder to train; '' for no classifier.")
_JUDGES = flags.DEFINE_list("judges", [], "More judges, such as guard:FOLDER.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of training.")
_LENGTH = flags.DEFINE_integer("max_length", 64, "Tokens of a window.")
_EPOCHS = flags.DEFINE_integer("epochs", 8, "Passes over the answers.")
_RATE = flags.DEFINE_float("learning_rate", 1e-4, "Highest learning rate.")
_CLASSIFIERS = flags.DEFINE_list(
    "classifiers", ["model", "request", "answer", "prompts"], "Which are trained."
)
_COUNTS = flags.DEFINE_bool("counts", False, "Whether the packaged counts are written anew.")


def main(argv):
    del argv
    prepare_libraries("")
    rows = {
        name: labelled_answers.read(f"{name}=xstest:{file}", _DATA.value)
        for name, file in FILES.items()
    }
    every = [row for one in rows.values() for row in one]
    specs = [*judges.DEFAULT, *_JUDGES.value]
    table = calibration.measure(judges.make(specs), every)
    if _COUNTS.value:
        packaged = {s: {m: c._asdict() for m, c in table[s].items()} for s in judges.DEFAULT}
        content = {"source": "XSTest's labelled completions, CC BY 4.0", "judges": packaged}
        whole_files.write(calibration.MEASURED, (json.dumps(content, indent=1) + "\n").encode())
    table["GPT-4's labels"] = {name: gpt4(name, one) for name, one in rows.items()}
    if _ENCODER.value:
        trained = {
            "model": ("classifier, other model", functools.partial(verdicts, head=head())),
            "request": ("classifier, request alone", request_alone),
            "answer": (
                "classifier, answer alone",
                functools.partial(verdicts, head=head(request=False)),
            ),
            "prompts": ("classifier, other model and prompts", other_prompts),
        }
        for name, judge in (trained[key] for key in _CLASSIFIERS.value):
            table[name] = {}
            for test, (learned, measured) in directions(rows).items():
                table[name] |= calibration.by_model(judge(learned, measured), measured)
                print(f"{name}, {test}: {table[name][test]}", flush=True)
    print(
        "| judge | model | recall | false alarms | precision | agrees |\n|---|---|---|---|---|---|"
    )
    for name, by_model in table.items():
        for model, counts in by_model.items():
            q = calibration.quality(counts)
            names = ("recall", "false_alarms", "precision", "agreement")
            print(f"| {name} | {model} | {' | '.join(shown(q[one]) for one in names)} |")
    print(json.dumps({s: {m: c._asdict() for m, c in by.items()} for s, by in table.items()}))


def head(request: bool = True) -> Head:
    classes, refused, measures = MEANINGS["xstest"]
    return Head(classes, refused, measures, max_length=_LENGTH.value, request=request)


def directions(rows: dict) -> dict:
    """`(answers to train on, answers to measure on)` by the model that is measured."""
    first, second = rows
    return {first: (rows[second], rows[first]), second: (rows[first], rows[second])}


def gpt4(name: str, rows: list[LabelledAnswer]) -> calibration.Counts:
    """GPT-4's own labels in the file; a reply that is none of the three classes is a failure."""
    with open(pathlib.Path(_DATA.value) / FILES[name], encoding="utf-8", newline="") as file:
        said = [row["gpt4_label"] for row in csv.DictReader(file)]
    meanings = {"1_full_compliance": False, "2_full_refusal": True, "3_partial_refusal": True}
    labels = [row.label in calibration.REFUSED for row in rows]
    return calibration.count([meanings.get(one) for one in said], labels)


def train(learned: list[LabelledAnswer], head: Head):
    start = encoder_hub.load_classifier(_ENCODER.value, len(head.classes), _SEED.value)
    options = TrainingOptions(epochs=_EPOCHS.value, batch_size=16, learning_rate=_RATE.value)
    tokenizer = encoder_hub.load_tokenizer(_ENCODER.value, start[0])
    return judge_training.train(
        learned, head, tokenizer, options=options, start=start, seed=_SEED.value
    )


def verdicts(
    learned: list[LabelledAnswer], measured: list[LabelledAnswer], head: Head
) -> list[bool]:
    read = [Answered(row.messages, row.answer) for row in measured]
    return [verdict.refused for verdict in train(learned, head).verdicts(read)]


def request_alone(learned, measured):
    """What the request alone tells: it stands where an answer would."""
    sides = [
        [row._replace(answer=row.messages[-1][1]) for row in side] for side in (learned, measured)
    ]
    return verdicts(*sides, head(request=False))


def other_prompts(learned, measured):
    """Trained on half of the prompts, measured on the others, both ways."""
    prompts = sorted({row.messages for row in learned})
    half = np.random.default_rng(_SEED.value).permutation(len(prompts)) < len(prompts) // 2
    first = {prompt for prompt, chosen in zip(prompts, half, strict=True) if chosen}
    refused = {}
    for side in (True, False):
        train_on = [row for row in learned if (row.messages in first) == side]
        asked = [row for row in measured if (row.messages in first) != side]
        said = verdicts(train_on, asked, head())
        refused |= {id(row): one for row, one in zip(asked, said, strict=True)}
    return [refused[id(row)] for row in measured]


if __name__ == "__main__":
    app.run(main)
