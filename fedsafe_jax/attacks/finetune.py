"""Fine-tuning: a few pairs and steps of LoRA on the released model, and refusal after each of them.

"Fine-tuning Aligned Language Models Compromises Safety, Even When Users Do Not Intend To!" (Qi et
al., 2023, arXiv 2310.03693): ten harmful pairs undo alignment, and harmless ones some of it. Both
may be given; they are then one training set, as in "harmful fine-tuning" with a share of harmful
pairs (Huang et al., 2024, arXiv 2409.18169).

An adapter on the model is trained on from its own factors: what is released is a base with an
adapter, and this is what whoever downloads both does. A fresh adapter above a merged one would need
a second copy of the kernels, which quantised ones cannot hold. A model without an adapter gets a
fresh one. Training is that of a client: one client's round is the whole attack.
"""

import math
from collections.abc import Sequence

import jax
import numpy as np

from fedsafe_jax.attacks.contract import (
    Attack,
    Attacked,
    AttackError,
    AttackPrompt,
    Settings,
    Stage,
    without_search,
)
from fedsafe_jax.data import overlap
from fedsafe_jax.data.examples import Example
from fedsafe_jax.evals.task import subset
from fedsafe_jax.finetune import ADAPTER, FRESH, adapters_by_step
from fedsafe_jax.inference.language_model import LanguageModel


def attack(
    models: Sequence[LanguageModel],
    requests: Sequence[Example],
    targets: Sequence[Sequence[str]],
    settings: Settings,
    key: jax.Array,
) -> Attacked:
    """Trains each model on the pairs, and returns it after each number of steps.

    Args:
      models, requests, targets, settings, key: as in `Attack.run`.

    Returns:
      Stages by `settings.finetune_steps`, which are asked the requests as they are; counts of the
      pairs of both kinds that are trained on, and of those dropped since they are near a request.

    Raises:
      AttackError: no pair is left to train on.
      PartitionError: no pair fits into a row.
    """
    del targets
    (harmful, benign), dropped = training_pairs(settings, requests)
    pairs = [(one.prompt, one.response) for one in (*harmful, *benign)]
    seed = int(jax.random.bits(key))
    changed: dict[int, list[LanguageModel]] = {
        step: list(models) if not step else [] for step in settings.finetune_steps
    }
    steps, losses = [step for step in changed if step], []
    for lm in models if steps else ():
        adapters, loss = adapters_by_step(
            lm,
            pairs,
            steps,
            start=FRESH if lm.adapter is None else ADAPTER,
            batch_size=settings.finetune_batch_size,
            learning_rate=settings.finetune_rate,
            seed=seed,
        )
        for step, adapter in zip(steps, adapters, strict=True):
            changed[step].append(lm.with_adapter(adapter))
        losses.append(loss)
        settings.note(f"finetune: {lm.name}, {len(loss)} steps, {loss[0]:.3f} to {loss[-1]:.3f}")
    stages, before = [], 0
    for step, stage in changed.items():
        part = np.asarray(losses)[:, before:step] if step else np.zeros(0)
        stages.append(Stage(step, stage, float(part.mean()) if part.size else math.nan))
        before = step
    asked = without_search([[AttackPrompt(request.messages)] for request in requests])
    counts = {"harmful_pairs": len(harmful), "benign_pairs": len(benign)}
    counts |= {"dropped_near_evaluation": dropped}
    return asked._replace(stages=tuple(stages), counts=counts)


def training_pairs(
    settings: Settings, requests: Sequence[Example]
) -> tuple[tuple[list[Example], list[Example]], int]:
    """Returns the pairs that a model is trained on: none near a prompt that it is asked later.

    Args:
      settings: pairs, and how many of each kind are taken.
      requests: the requests of the attack.

    Returns:
      `((harmful, benign), dropped)`, the last one the number of pairs near one of the requests or
      of `settings.harmless`.

    Raises:
      AttackError: of a kind that is given no pair is left.
    """
    asked = [text for one in (*requests, *settings.harmless) for text in _asked(one)]
    kinds, dropped = [], 0
    for kind, given in (("harmful", settings.pairs), ("benign", settings.benign_pairs)):
        kept, near = overlap.drop_overlap(given, asked)
        if given and not kept:
            raise AttackError(
                f"'finetune': all {len(given)} {kind} pairs are near a prompt that the model is "
                "asked after the training; give other pairs."
            )
        kinds.append(subset(kept, settings.finetune_pairs))
        dropped += near
    return (kinds[0], kinds[1]), dropped


def _asked(request: Example) -> list[str]:
    return [text for role, text in request.messages if role == "user"]


def _check(settings: Settings) -> None:
    if not settings.pairs and not settings.benign_pairs:
        raise AttackError("'finetune' needs pairs with answers to train on.")


FINETUNE = Attack(attack, _check, check_requests=training_pairs)
