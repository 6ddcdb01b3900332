"""The clients of one seed: their roles, and the pairs they train on, encoded."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from fedsafe_jax.data import chat
from fedsafe_jax.data.chat import Encoded
from fedsafe_jax.data.chat_template import ChatTemplateError
from fedsafe_jax.data.examples import Example
from fedsafe_jax.federated import participation
from fedsafe_jax.filters.actions import FilterCounts
from fedsafe_jax.filters.protocol import answer_risk
from fedsafe_jax.filters.quality import FilterQuality, Reliability
from fedsafe_jax.pipeline.inputs import RunInputs, refused
from fedsafe_jax.runtime.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Roles(NamedTuple):
    """What distinguishes the clients of a seed.

    Attributes:
      malicious: ids of the clients that hold `attack.harmful_share` and multiply their updates.
      ranks: int32 `[num_clients]`, rank of each client's adapter.
    """

    malicious: tuple[int, ...]
    ranks: np.ndarray


def roles(config: ConfigDict, seed: int) -> Roles:
    """Draws who is malicious, and deals out the ranks."""
    ranks = config.federated.client_ranks or (config.lora_rank,)
    return Roles(
        participation.malicious_clients(seed, config.num_clients, config.attack.clients),
        np.array([ranks[i % len(ranks)] for i in range(config.num_clients)], np.int32),
    )


@dataclasses.dataclass(frozen=True)
class Clients:
    """The clients of one seed: encoded pairs with and without the filter.

    Attributes:
      plain, filtered: encoded pairs by client; `filtered` is None without a filter.
      counts: `FilterCounts` by client.
      categories: `{category: (flagged, all)}` over all clients.
      quality, reliability, auroc: quality of the verdicts, as labels are known in simulation; None
        without a filter.
      threshold: P(unsafe) from which pairs were flagged.
      at_bound: whether the filter's calibration ended at a bound, see `decision.Decision`.
      make_filter: `() -> filter`; None without a filter, or for a simulated one.
    """

    plain: Sequence[Sequence[Encoded]] | None
    filtered: Sequence[Sequence[Encoded]] | None = None
    counts: Sequence[FilterCounts] | dict[int, FilterCounts] | None = None
    categories: dict | None = None
    quality: FilterQuality | None = None
    reliability: Reliability | None = None
    auroc: float | None = None
    threshold: float | None = None
    at_bound: bool = False
    make_filter: Callable | None = None

    def judge(self) -> tuple[Callable, float]:
        """Returns `(dialogues, answers) -> P(unsafe)` by the seed's filter, and its threshold."""
        return answer_risk(self.make_filter()), self.threshold

    def filter_record(self) -> dict:
        """Returns what `results.json` keeps of the filter of a seed."""
        return self.quality._asdict() | {
            "auroc": self.auroc,
            "threshold": self.threshold,
            "calibration_at_bound": self.at_bound,
            "reliability": self.reliability._asdict(),
            "categories": self.categories,
        }


def build(config: ConfigDict, inputs: RunInputs, seed: int, progress: Progress) -> Clients:
    """Encodes every client's pairs, and says where fewer are left than were asked for."""
    pairs = inputs.clients[seed]
    asked, held = config.num_clients * config.examples_per_client, sum(map(len, pairs))
    if held < asked and not config.size_sigma:
        progress.note(f"seed {seed}: clients hold {held} of {asked} pairs asked for: no more data")
    encoded = [encode(inputs.lm.tokenizer, examples, config.seq_len) for examples in pairs]
    if lost := sum(count for _, count in encoded):
        progress.note(
            f"seed {seed}: {lost} pairs lost: their template alone fills seq_len, or their "
            "thought never ends"
        )
    done = Counter(said for one, _ in encoded for e in one for said in e.notes)
    for said, count in done.items():
        progress.note(f"seed {seed}: {count} of {held} pairs: {said}")
    return Clients([examples for examples, _ in encoded])


def encode(
    tokenizer: "PreTrainedTokenizerBase",
    examples: Sequence[Example],
    seq_len: int,
    weights: Sequence[float] | None = None,
) -> tuple[list[Encoded], int]:
    """Encodes (prompt, response) dialogues.

    Args:
      tokenizer: Hugging Face tokenizer with a chat template.
      examples: the dialogues.
      seq_len: most tokens of a dialogue.
      weights: factor on the loss of each dialogue; None for 1.

    Returns:
      `(encoded, lost)`: a dialogue whose template alone fills `seq_len` has no target, and is lost.

    Raises:
      SourceError: the chat template refuses the roles of a dialogue, or their order.
    """
    if weights is None:
        weights = [1.0] * len(examples)
    encoded = []
    for example, weight in zip(examples, weights, strict=True):
        try:
            one = chat.encode(tokenizer, example.messages, example.response, seq_len)
        except ChatTemplateError as error:
            raise refused(example, error, "client") from error
        if one is not None and weight != 1:
            one = one._replace(loss_mask=one.loss_mask * np.float32(weight))
        encoded.append(one)
    kept = [one for one in encoded if one is not None]
    return kept, len(encoded) - len(kept)
