"""Lengths of examples, all that a compilation needs to know of the data."""

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import ndtri

from fedsafe_jax.aot.targets import TargetError
from fedsafe_jax.data.chat import Encoded
from fedsafe_jax.random_streams import Purpose, generator

# Of the Dolly data set with a chat template: logarithms of the tokens of prompts and of responses
# are about normal, with these means and deviations.
DOLLY_PROMPT, DOLLY_RESPONSE = (5.16, 0.62), (3.14, 1.09)
COUNT = 1000


class Lengths(NamedTuple):
    """Tokens of the prompt and of the response of each example, int64 `[examples]`."""

    prompts: np.ndarray
    responses: np.ndarray

    def encoded(self, count: int, most: int) -> list[Encoded]:
        """Returns `count` examples of these lengths, cut at `most` tokens, with targets left."""
        examples = []
        for i in range(count):
            prompt = min(int(self.prompts[i % len(self.prompts)]), most - 1)
            whole = min(prompt + int(self.responses[i % len(self.responses)]), most)
            examples.append(Encoded(np.zeros(whole, np.int32), np.arange(whole) >= prompt))
        return examples


def default() -> Lengths:
    """Returns lengths distributed as those of Dolly, the same in every call."""

    def draw(mean: float, deviation: float, seed: int) -> np.ndarray:
        quantiles = (np.arange(COUNT) + 0.5) / COUNT
        lengths = np.exp(mean + deviation * ndtri(quantiles)).round().astype(int)
        return generator(Purpose.LENGTHS, seed).permutation(np.maximum(lengths, 1))

    return Lengths(draw(*DOLLY_PROMPT, seed=0), draw(*DOLLY_RESPONSE, seed=1))


def read(path: str) -> Lengths:
    """Reads a file of lengths: a line an example, its tokens of prompt and of response.

    Raises:
      TargetError: no such file, or a line that is not two positive numbers.
    """
    try:
        lines = pathlib.Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TargetError(f"--lengths={path}: cannot be read ({error}).") from None
    rows: list[Sequence[int]] = []
    for number, line in enumerate(lines, 1):
        fields = line.replace(",", " ").split()
        if not fields:
            continue
        if len(fields) != 2 or not all(f.isdecimal() and int(f) > 0 for f in fields):
            raise TargetError(
                f"--lengths={path}, line {number}: '{line.strip()}'; expected two numbers, the "
                "tokens of the prompt and of the response."
            )
        rows.append([int(f) for f in fields])
    if not rows:
        raise TargetError(f"--lengths={path}: holds no lengths.")
    prompts, responses = np.array(rows).T
    return Lengths(prompts, responses)
