"""Every random draw of the package: one table of purposes, and a stream of its own for each use.

A stream is named by its purpose, the seed and a place: round, client, call, whatever the purpose
says. numpy's `SeedSequence` hashes all of them with their positions (`spawn_key`), so that no two
streams coincide. Seeds made by hand do: `default_rng([s, 8])` is `default_rng([s, 8, 0])`, since
numpy fills entropy up with zeros.
"""

import enum
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import jax

WORD = 2**32  # a larger number in a place would fill two words, and could be taken for two places
SEEDS = 2**128  # SeedSequence's entropy; a longer seed would run on into the place


class Purpose(enum.IntEnum):
    """What is drawn; in brackets the place that follows the seed.

    A number is never changed and never used again, as it decides what a seed draws.
    """

    COHORT = 1  # the clients of a round (round)
    ABSENCE = 2  # who drops out of a round, and who does fewer steps (round)
    MALICIOUS = 3  # the clients that are malicious in a run
    DEAL = 4  # the pairs of each client
    EXAMPLES = 5  # the order in which a client takes its pairs (round, client)
    ADAPTER = 6  # the adapter's first factors
    NOISE = 7  # the noise of differential privacy; the seed is the run's secret (round)
    CAI_PROMPTS = 8  # prompts and replay of a round of Constitutional AI (round)
    CAI_PRINCIPLES = 9  # the principle of each prompt (round)
    CAI_SAMPLES = 10  # answers, critiques and revisions (round, call)
    CAI_STEPS = 11  # the order of training, and the prefixes of DeRTa (round)
    FILTER_SPLIT = 12  # prompts on which a filter is validated
    FILTER_START = 13  # a filter's first weights, or those of its head
    FILTER_ORDER = 14  # the order of training (epoch)
    FILTER_DROPOUT = 15  # dropout in training
    FILTER_VERDICTS = 16  # verdicts of a simulated filter
    FILTER_HARD_NEGATIVES = 17  # refusals as safe twins of harmful pairs
    FILTER_PRINCIPLES = 18  # the principles by which flagged answers are revised
    FILTER_RESAMPLE = 19  # held-out pairs at another share of unsafe ones
    FILTER_LIMIT = 20  # `max_per_source` of a filter's training (source)
    REVISE_PRINCIPLES = 21  # `fedsafe revise`: the principle of each prompt
    REVISE_SAMPLES = 22  # `fedsafe revise`: answers, critiques and revisions (call)
    SAMPLES = 23  # sampled tokens of any generation
    EVALUATION = 24  # the items that are asked; the seed is the same in every run
    PROBE = 25  # the prompts that Constitutional AI estimates refusal on
    BOOTSTRAP = 26  # resampled seeds and items of an interval
    SKETCH = 27  # the signs of the sketch of an update
    PRODUCTS = 28  # the projections of products of factors (projection)
    PRETRAIN_DATA = 29  # dialogues and rows of the packaged model's training
    PRETRAIN_START = 30  # its first weights
    LENGTHS = 31  # the order of the lengths that programs are compiled ahead for
    SHAPES = 32  # nothing: arrays of which only the shapes are asked
    ADAPTER_DROPOUT = 33  # bits by which clients drop inputs of the adapter (round, client, batch)
    CAI_GIVEN = 34  # the order of ready-made records (epoch)
    FRESH_SLOTS = 35  # ranks that the mean of products leaves empty (round)
    JUDGE_ORDER = 36  # a judge's training: its order, and whose requests are left out (epoch)
    ATTACK = 37  # candidates of an attack's search; folded by request and step
    POISON = 38  # the pairs that a malicious client changes (client)
    CRITIC_START = 39  # a critic's first weights
    CRITIC_DRAWS = 40  # a critic's training: its split, its order and its budgets (epoch)
    TURNS = 41  # where a harmful answer turns to a refusal; the seed is the pair's hash


def _sequence(purpose: Purpose, seed: int, where: tuple[int, ...]) -> np.random.SeedSequence:
    if not 0 <= seed < SEEDS:
        raise ValueError(f"seed={seed}: expected a whole number from 0 to 2**128 - 1.")
    for place in where:
        if not 0 <= place < WORD:
            raise ValueError(f"{purpose.name} at {where}: expected whole numbers below 2**32.")
    return np.random.SeedSequence(int(seed), spawn_key=(int(purpose), *map(int, where)))


def generator(purpose: Purpose, seed: int, *where: int) -> np.random.Generator:
    """Returns numpy's generator of a stream.

    Args:
      purpose: what is drawn.
      seed: seed of the run, 0 to 2**128 - 1.
      *where: place within the purpose, such as a round and a client; each 0 to 2**32 - 1.

    Raises:
      ValueError: a number is out of bounds.
    """
    return np.random.default_rng(_sequence(purpose, seed, where))


def key(purpose: Purpose, seed: int, *where: int) -> "jax.Array":
    """Returns the jax key of a stream, from the same words as `generator`'s.

    It is a key of threefry, whatever `jax_default_prng_impl` says: a seed draws the same on every
    device. Programs may fold numbers into it.

    Args:
      purpose, seed, where: see `generator`.

    Raises:
      ValueError: a number is out of bounds.
    """
    import jax  # here, so that what draws by numpy alone starts without it

    words = _sequence(purpose, seed, where).generate_state(2, np.uint32)
    return jax.random.wrap_key_data(words, impl="threefry2x32")


def seed(purpose: Purpose, run_seed: int, *where: int) -> int:
    """Returns a seed of 63 bits for what takes one number, such as `LanguageModel.generate`.

    Args:
      purpose, run_seed, where: see `generator`.
    """
    return int(generator(purpose, run_seed, *where).integers(2**63))
