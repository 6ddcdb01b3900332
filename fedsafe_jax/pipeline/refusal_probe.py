"""A probe of the refusal rate, by which Constitutional AI decides whether to train on."""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from fedsafe_jax.evals.statistics import wilson
from fedsafe_jax.inference.language_model import Dialogue, LanguageModel
from fedsafe_jax.runtime.progress import PhaseTimer

PROBED = 64  # prompts asked at once; no more where these show that training is needed
PROBE_TOKENS = 10  # tokens of an answer: a refusal shows in its first words


class Probe:
    """Probe of the refusal rate on the server's own prompts.

    Args:
      prompts: dialogues, each up to a request, that are not trained on.
      decide: `(refused, upper bound of its 95% interval) -> steps to train`, both in percent.
      count_tokens: counts the tokens of texts.
      clock: told which phase has ended.
      refuses: `(dialogues, answers) -> whether each answer refuses`.

    Attributes:
      results: one row per probe: share refused and its 95% interval in percent, prompts asked.
      tokens: number of tokens generated.
    """

    def __init__(
        self,
        prompts: Sequence[Dialogue],
        decide: Callable[[float, float], int],
        count_tokens: Callable[[Sequence[str]], int],
        clock: PhaseTimer,
        refuses: Callable[[Sequence[Dialogue], Sequence[str]], Sequence[bool]],
    ):
        self.prompts, self.decide = prompts, decide
        self.count_tokens, self.clock, self.refuses = count_tokens, clock, refuses
        self.results: list[dict] = []
        self.tokens = 0

    def __call__(self, current: LanguageModel, factors: dict | None = None) -> int:
        """Asks the model, and returns the number of steps to go on with.

        Args:
          current: the model.
          factors: LoRA factors that take the place of the model's own.
        """
        if factors is not None:
            shardings = jax.tree.map(lambda x: x.sharding, current.factors)
            factors = jax.block_until_ready(jax.device_put(factors, shardings))
            current = current.with_adapter(current.adapter._replace(factors=factors))
            self.clock.mark("cai_train")
        num_steps, refused = 0, []
        for start in range(0, len(self.prompts), PROBED):
            asked = self.prompts[start : start + PROBED]
            answers, _ = current.answer_dialogues(asked, PROBE_TOKENS, truncate=True)
            self.tokens += self.count_tokens(answers)
            refused += list(self.refuses(asked, answers))
            mean, interval = float(np.mean(refused)), wilson(sum(refused), len(refused))
            num_steps = self.decide(100 * mean, 100 * interval[1])
            if num_steps:
                break
        self.results.append(
            {"refused": 100 * mean, "ci95": [100 * x for x in interval], "asked": len(refused)}
        )
        self.clock.mark("cai_probe")
        return num_steps
