"""Training of a judge's encoder on answers that humans have labelled, split by model.

What is to be learned is what refusals look like, not which prompts are refused: files of labels
hold the same prompts for every model. So in half of the draws the request is left out.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from fedsafe_jax import random_streams
from fedsafe_jax.data.labelled_answers import LabelledAnswer
from fedsafe_jax.data.packing import round_up
from fedsafe_jax.evals.judges import Answered, JudgeError
from fedsafe_jax.evals.judges.classifier import EncoderJudge, Head, windows
from fedsafe_jax.filters import training
from fedsafe_jax.filters.classifier import weighted_loss
from fedsafe_jax.filters.pair_rows import Encoded, pad
from fedsafe_jax.filters.training import TrainingOptions
from fedsafe_jax.models.encoder import Classifier, EncoderConfig
from fedsafe_jax.random_streams import Purpose

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REQUEST_LEFT_OUT = 0.5  # share of the draws in which the request is not read
HEAVIEST = 3.0  # most weight of a class, for classes with a handful of answers


def split(
    rows: Sequence[LabelledAnswer], test_models: Sequence[str]
) -> tuple[list[LabelledAnswer], list[LabelledAnswer]]:
    """Splits labelled answers by who gave them, into those to train on and those to measure on.

    Args:
      rows: labelled answers.
      test_models: models whose answers are not trained on.

    Raises:
      JudgeError: a test model has no answer, or nobody is left to train on.
    """
    models = list(dict.fromkeys(row.model for row in rows))
    if missing := [name for name in test_models if name not in models]:
        raise JudgeError(
            f"--test_models: no answer of '{missing[0]}'; the models are {', '.join(models)}."
        )
    learned = [row for row in rows if row.model not in test_models]
    if not learned:
        raise JudgeError("--test_models: they are all models; leave one to train on.")
    return learned, [row for row in rows if row.model in test_models]


def train(
    rows: Sequence[LabelledAnswer],
    head: Head,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    options: TrainingOptions,
    start: tuple[EncoderConfig, dict] | None,
    seed: int,
) -> EncoderJudge:
    """Trains all weights with AdamW and cross-entropy for a fixed number of epochs.

    Classes are weighted towards balance, none by more than three. There is no early stopping: how
    well a judge does on prompts and models that it has seen says little of others.

    Args:
      rows: labelled answers.
      head: the classes and what is read.
      tokenizer: Hugging Face tokenizer.
      options: epochs, batch size, learning rate and weight decay; the rest is a filter's alone.
      start: a pre-trained encoder with a head of these classes; None for a small one from scratch.
      seed: seed of first weights, order and dropout.

    Raises:
      JudgeError: a label is no class, or a class has no answer.
    """
    target = _targets(rows, head)
    read = [Answered(row.messages, row.answer) for row in rows]
    whole = [windows(tokenizer, one, head)[0] for one in read]
    alone = [windows(tokenizer, one._replace(messages=()), head)[0] for one in read]
    if start is None:
        config = EncoderConfig(
            len(tokenizer), max_length=head.max_length, num_labels=len(head.classes)
        )
        key = random_streams.key(Purpose.FILTER_START, seed)
        params = Classifier(config).init(key, *pad(whole[:1], head.max_length, 1))["params"]
    else:
        config, params = start
    share = np.bincount(target, minlength=len(head.classes)) * len(head.classes) / len(target)
    balance = np.minimum(1 / share, HEAVIEST).astype(np.float32)
    size = options.batch_size
    optimizer = training.make_optimizer(options, steps_per_epoch=-(-len(rows) // size))
    step = training.make_step(functools.partial(weighted_loss, Classifier(config)), optimizer)
    state, key = optimizer.init(params), random_streams.key(Purpose.FILTER_DROPOUT, seed)
    for epoch in range(options.epochs):
        drawn = _draw(whole, alone, size, seed=seed, epoch=epoch)
        for number, (chosen, batch_rows) in enumerate(drawn):
            width = min(round_up(max(len(row.ids) for row in batch_rows)), config.max_length)
            weight, label = np.zeros(size, np.float32), np.zeros(size, np.int32)
            weight[: len(chosen)] = balance[target[chosen]]
            label[: len(chosen)] = target[chosen]
            step_key = jax.random.fold_in(jax.random.fold_in(key, epoch), number)
            data = (pad(batch_rows, width, size), label, weight)
            params, state = step(params, state, (), data, step_key)
    return EncoderJudge(head, config, params, tokenizer)


def _targets(rows: Sequence[LabelledAnswer], head: Head) -> np.ndarray:
    """Returns the class of each row, int32 `[rows]`."""
    number = {name: i for i, name in enumerate(head.classes)}
    for row in rows:
        if row.label not in number:
            raise JudgeError(
                f"{row.place}: label '{row.label}' is none of the classes "
                f"{', '.join(head.classes)}."
            )
    target = np.array([number[row.label] for row in rows], np.int32)
    if empty := [name for name in head.classes if number[name] not in target]:
        raise JudgeError(f"class '{empty[0]}' has no answer to train on.")
    return target


def _draw(
    whole: Sequence[Encoded], alone: Sequence[Encoded], size: int, *, seed: int, epoch: int
) -> Iterator[tuple[np.ndarray, list[Encoded]]]:
    """Yields the batches of an epoch: indices of the answers, and their rows."""
    rng = random_streams.generator(Purpose.JUDGE_ORDER, seed, epoch)
    left_out = rng.random(len(whole)) < REQUEST_LEFT_OUT
    rows = [alone[i] if out else whole[i] for i, out in enumerate(left_out)]
    order = rng.permutation(len(rows))
    batches = []
    for first in range(0, len(order), size * training.BUCKET):
        bucket = order[first : first + size * training.BUCKET]
        bucket = np.array(sorted(bucket, key=lambda i: len(rows[i].ids)))
        batches += [bucket[b : b + size] for b in range(0, len(bucket), size)]
    for number in rng.permutation(len(batches)):
        yield batches[number], [rows[i] for i in batches[number]]
