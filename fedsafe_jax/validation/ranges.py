"""Which numbers each numeric field of a config may hold, and what its lists hold."""

import math
from typing import NamedTuple


class Range(NamedTuple):
    """The numbers from `low` to `high`; never NaN or infinity.

    Attributes:
      low, high: smallest and largest number.
      above, below: whether `low`, or `high`, is itself left out.
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False

    def holds(self, value: float) -> bool:
        """Returns whether a number is inside."""
        if not math.isfinite(value) or (self.above and value == self.low):
            return False
        return self.low <= value <= self.high and not (self.below and value == self.high)

    def __str__(self) -> str:
        """The range in words, such as "at least 1"."""
        if self.low == -math.inf:
            return "a finite number"
        if self.high == math.inf:
            return f"{'more than' if self.above else 'at least'} {self.low:g}"
        if (self.low, self.above) == (0, False) and self.high <= 1:
            return f"a share between 0 and {self.high:g}{', less than it' if self.below else ''}"
        return (
            f"{'more than' if self.above else 'at least'} {self.low:g}, "
            f"{'less than' if self.below else 'at most'} {self.high:g}"
        )


COUNT, SIZE = Range(0), Range(1)
POSITIVE = Range(0, above=True)
LENGTH = Range(16)  # tokens; a shorter row holds no dialogue with its roles
SHARE, SHARE_BELOW_ONE = Range(0, 1), Range(0, 1, below=True)

RANGES: dict[str, Range] = {
    "model_parallel": SIZE,
    "dirichlet_alpha": POSITIVE,
    "num_clients": SIZE,
    "examples_per_client": SIZE,
    "size_sigma": COUNT,
    "harmful_share": SHARE,
    "attack.clients": SHARE,
    "attack.harmful_share": SHARE,
    "attack.boost": POSITIVE,
    "rounds": SIZE,
    "clients_per_round": SIZE,
    "local_steps": SIZE,
    "batch_size": SIZE,
    "seq_len": LENGTH,
    "accumulation": SIZE,
    "gradient_clip": COUNT,
    "learning_rate": POSITIVE,
    "min_learning_rate": COUNT,
    "warmup_rounds": COUNT,
    "lora_rank": SIZE,
    "lora_alpha": POSITIVE,
    "lora_dropout": SHARE_BELOW_ONE,
    "clients_in_parallel": COUNT,
    "chunk_clients": COUNT,
    "checkpoint_every": SIZE,
    "checkpoint_keep": COUNT,
    "federated.noise_bands": SIZE,
    "federated.dropout": Range(0, 0.99),
    "federated.stragglers": SHARE,
    "federated.prox_mu": COUNT,
    "federated.rotation": SHARE,
    "federated.residue_rank": COUNT,
    "federated.dyn_alpha": POSITIVE,
    "federated.download_share": Range(0, 1, above=True),
    "federated.kl_weight": COUNT,
    "federated.safe_lora_threshold": SHARE,
    "federated.attribution": COUNT,
    "federated.server_learning_rate": POSITIVE,
    "federated.adaptive_learning_rate": POSITIVE,
    "federated.beta1": SHARE_BELOW_ONE,
    "federated.beta2": SHARE_BELOW_ONE,
    "federated.tau": POSITIVE,
    "federated.trim_share": Range(0, 0.49),
    "federated.byzantine": COUNT,
    "federated.min_answers": COUNT,
    "federated.clip_norm": COUNT,
    "federated.noise_multiplier": COUNT,
    "federated.delta": Range(0, 1, above=True, below=True),
    "federated.topk_share": Range(0, 1, above=True),
    "filter.lora_rank": SIZE,
    "filter.hard_negatives": SHARE,
    "filter.epochs": COUNT,
    "filter.batch_size": SIZE,
    "filter.learning_rate": POSITIVE,
    "filter.patience": SIZE,
    "filter.validation_share": SHARE_BELOW_ONE,
    "filter.max_length": LENGTH,
    "filter.threshold": SHARE_BELOW_ONE,
    "filter.unsafe_share": SHARE_BELOW_ONE,
    "filter.precision_floor": SHARE_BELOW_ONE,
    "filter.simulated_recall": SHARE,
    "filter.simulated_precision": Range(0, 1, above=True),
    "cai.red_team_prompts": SIZE,
    "cai.benign_prompts": COUNT,
    "cai.replay_examples": COUNT,
    "cai.few_shots": COUNT,
    "cai.revision_rounds": SIZE,
    "cai.target": Range(0, 100, above=True),
    "cai.probe_prompts": SIZE,
    "cai.steps": SIZE,
    "cai.batch_size": SIZE,
    "cai.pairs_per_step": SIZE,
    "cai.learning_rate": POSITIVE,
    "cai.beta": POSITIVE,
    "cai.max_new_tokens": SIZE,
    "cai.temperature": COUNT,
    "eval.client": COUNT,
    "eval.judge_concurrent": SIZE,
    "eval.temperature": COUNT,
    "eval.samples": SIZE,
    "eval.max_prompts": COUNT,
    "eval.max_heldout": COUNT,
    "eval.max_new_tokens": SIZE,
    "eval.max_length": LENGTH,
    "eval.batch_size": SIZE,
    "eval.every_round_prompts": COUNT,
    # Of `config.filter_config` alone.
    "max_per_source": COUNT,
    "seed": COUNT,
}

# Lists of numbers, and the range of each; all other lists are of text. Seeds are 32 bits long, as
# jax's are.
NUMBER_LISTS = {
    "seeds": Range(0, 2**32 - 1),
    "federated.client_ranks": SIZE,
    "federated.exclude": COUNT,
    "federated.constrained_betas": COUNT,
    "cai.weights": POSITIVE,
}
WHOLE_NUMBERS = ("seeds", "federated.client_ranks", "federated.exclude")
