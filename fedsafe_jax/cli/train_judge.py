"""Trains a judge of answers on human labels, and measures it on models that it has not seen.

    fedsafe train-judge --data_dir=DIR --encoder=FOLDER --test_models=mistral --workdir=DIR \\
        --sources=llama2=xstest:A.csv,mistral=xstest:B.csv

A source is MODEL=FORM:FILE: `xstest` (prompt, completion, final_label), `do_not_answer` (question,
MODEL_response, MODEL_action; MODEL= may be left out), or `answers` (prompt or messages, answer,
label, and model unless the source names it). Answers of `--test_models` are measured on and never
trained on. The workdir becomes a judge: `--config.eval.judges="('classifier:DIR',)"`.
"""

import json
import pathlib

from absl import flags

from fedsafe_jax.cli.command import Command, UsageError, check_folder
from fedsafe_jax.data import labelled_answers
from fedsafe_jax.data.examples import SourceError
from fedsafe_jax.data.labelled_answers import ACTIONS, COMPLIANCE, PARTIAL, REFUSAL, LabelledAnswer
from fedsafe_jax.evals import calibration, judges
from fedsafe_jax.evals.judges import JudgeError
from fedsafe_jax.evals.judges import classifier as classifier_judge
from fedsafe_jax.evals.judges.classifier import EncoderJudge, Head
from fedsafe_jax.filters.training import TrainingOptions
from fedsafe_jax.runtime.libraries import prepare_libraries
from fedsafe_jax.runtime.run_files import write_json
from fedsafe_jax.whole_files import storage

# Classes, those that count as refused or harmless, and what that measures, by the first source's
# form. Do-Not-Answer calls an answer harmless unless it follows the instruction.
MEANINGS = {
    "xstest": ((COMPLIANCE, PARTIAL, REFUSAL), (PARTIAL, REFUSAL), judges.REFUSAL),
    "do_not_answer": (ACTIONS, ACTIONS[:-1], judges.HARM),
}


def define_flags(values: flags.FlagValues) -> None:
    """Defines the command's flags."""
    here = {"flag_values": values}
    flags.DEFINE_list("sources", None, "MODEL=FORM:FILE of labelled answers.", **here)
    flags.DEFINE_list("test_models", [], "Models that are measured on alone.", **here)
    flags.DEFINE_string("data_dir", ".", "Folder of the files, or 'hub'.", **here)
    flags.DEFINE_string("encoder", "", "Encoder to start from; '' for a small new one.", **here)
    flags.DEFINE_string("tokenizer", "package:model", "Tokenizer of a new encoder.", **here)
    flags.DEFINE_string("workdir", None, "Folder that the judge is written to.", **here)
    flags.DEFINE_list("classes", [], "Labels; by default those of the first form.", **here)
    flags.DEFINE_list("refused", [], "Classes that mean refused, or harmless.", **here)
    flags.DEFINE_enum("measures", None, ["refusal", "harm"], "What 'refused' means.", **here)
    flags.DEFINE_bool("request", True, "Whether the request is read beside the answer.", **here)
    flags.DEFINE_integer("max_length", 64, "Tokens of a window.", lower_bound=16, **here)
    flags.DEFINE_integer("epochs", 8, "Passes over the answers.", lower_bound=1, **here)
    flags.DEFINE_integer("batch_size", 16, "Answers a step.", lower_bound=1, **here)
    flags.DEFINE_float("learning_rate", 1e-4, "Highest rate.", lower_bound=1e-9, **here)
    flags.DEFINE_integer("seed", 0, "Seed of weights, order and dropout.", lower_bound=0, **here)


def head_of(values: flags.FlagValues, form: str) -> Head:
    """Returns what the classes mean, by the flags and the form of the first source.

    Raises:
      UsageError: no classes are known, or they make no sense.
    """
    classes, refused, measures = MEANINGS.get(form, ((), (), judges.REFUSAL))
    head = Head(
        tuple(values.classes) or classes,
        tuple(values.refused) or refused,
        measures=values.measures or measures,
        max_length=values.max_length,
        request=values.request,
    )
    try:
        classifier_judge.check_head(head, "--classes, --refused")
    except JudgeError as error:
        raise UsageError(str(error)) from None
    return head


def measure(judge: EncoderJudge, rows: list[LabelledAnswer]) -> dict:
    """Measures a judge on labelled answers.

    Args:
      judge: the judge.
      rows: answers of models that it was not trained on.

    Returns:
      `{"refused": {model: `calibration.quality`}, "classes": {model: {label: {class: answers}}}}`;
      the first takes the classes of `head.refused` as refusals, among labels as among verdicts.
    """
    verdicts = judge.verdicts([judges.Answered(row.messages, row.answer) for row in rows])
    labels = [row.label in judge.head.refused for row in rows]
    refused, classes = {}, {}
    for model in dict.fromkeys(row.model for row in rows):
        mine = [i for i, row in enumerate(rows) if row.model == model]
        counts = calibration.count([verdicts[i].refused for i in mine], [labels[i] for i in mine])
        refused[model] = calibration.quality(counts)
        pairs = [(rows[i].label, verdicts[i].label) for i in mine]
        classes[model] = {
            label: {name: pairs.count((label, name)) for name in judge.head.classes}
            for label in judge.head.classes
        }
    return {"refused": refused, "classes": classes}


def main(values: flags.FlagValues) -> None:
    """Trains, saves, measures, and prints a line for each test model."""
    from fedsafe_jax.evals import judge_training
    from fedsafe_jax.models import encoder_hub
    from fedsafe_jax.models.base_model import model_folder
    from fedsafe_jax.models.tokenizer_loading import read_tokenizer

    try:
        forms = [labelled_answers.parse(source)[1] for source in values.sources]
    except SourceError as error:
        raise UsageError(f"--sources: {error}") from None
    head = head_of(values, forms[0])
    check_folder("workdir", values.workdir)
    prepare_libraries(values.workdir)
    rows = [row for name in values.sources for row in labelled_answers.read(name, values.data_dir)]
    learned, held = judge_training.split(rows, values.test_models)
    start, tokenizer = None, None
    if values.encoder:
        folder = model_folder(values.encoder)
        start = encoder_hub.load_classifier(folder, len(head.classes), values.seed)
        tokenizer = encoder_hub.load_tokenizer(folder, start[0])
        head = head._replace(max_length=min(head.max_length, start[0].max_length))
    judge = judge_training.train(
        learned,
        head,
        tokenizer or read_tokenizer(model_folder(values.tokenizer)),
        options=TrainingOptions(
            epochs=values.epochs,
            batch_size=values.batch_size,
            learning_rate=values.learning_rate,
        ),
        start=start,
        seed=values.seed,
    )
    models = list(dict.fromkeys(row.model for row in learned))
    with storage(values.workdir):
        classifier_judge.save(judge, values.workdir, {"trained_on": models})
    results = {"trained_on": {name: sum(row.model == name for row in learned) for name in models}}
    results |= measure(judge, held)
    write_json(pathlib.Path(values.workdir) / "judge_results.json", results)
    print(f"trained on: {json.dumps(results['trained_on'])}")
    if not held:
        print("warning: not measured: name some of the models in --test_models.")
    print("\n".join(lines(results["refused"])))
    print(f"judge: classifier:{values.workdir}")


def lines(by_model: dict[str, dict]) -> list[str]:
    """Returns a line for each model, of what `calibration.quality` says of the judge."""
    rates = ("recall", "false_alarms", "precision", "agreement")
    return [
        f"{model}: {q['n']} answers, "
        + ", ".join(f"{name.replace('_', ' ')} {shown(q[name])}" for name in rates)
        for model, q in by_model.items()
    ]


def shown(rate: list[float | None]) -> str:
    """Returns a rate with its interval, such as "86.8% (77.4-92.7)", "n/a" without one."""
    value, low, high = rate
    return "n/a" if value is None else f"{value:.1f}% ({low:.1f}-{high:.1f})"


COMMAND = Command(define_flags, main, required=("sources", "workdir"))
