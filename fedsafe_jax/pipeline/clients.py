"""The clients of one seed: their roles, and the pairs they train on, encoded."""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from fedsafe_jax.cai import derta
from fedsafe_jax.data import chat, dialogue_notes
from fedsafe_jax.data.chat import Encoded
from fedsafe_jax.data.chat_template import ChatTemplateError
from fedsafe_jax.data.examples import UNSAFE, Example
from fedsafe_jax.data.shares import possible_sizes
from fedsafe_jax.federated import participation
from fedsafe_jax.filters.actions import FilterCounts
from fedsafe_jax.filters.cache import content_hash
from fedsafe_jax.filters.protocol import answer_risk
from fedsafe_jax.filters.quality import FilterQuality, Reliability
from fedsafe_jax.pipeline.inputs import RunInputs, packaged_beside_own, refused
from fedsafe_jax.random_streams import Purpose, generator
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


class Holdings(NamedTuple):
    """What the clients of a seed hold to train on, before any filter.

    Attributes:
      unsafe, pairs: harmful pairs, and all pairs, of each client.
      lost: pairs that were dealt out, and of which nothing was left to learn.
      notes: pairs that were changed to fit the model's template or `seq_len`, see
        `dialogue_notes.count`.
    """

    unsafe: tuple[int, ...]
    pairs: tuple[int, ...]
    lost: int
    notes: dict[str, int]

    @property
    def harmful_share(self) -> float | None:
        """Share of all pairs that is harmful, in [0, 1]; None without pairs."""
        return sum(self.unsafe) / sum(self.pairs) if sum(self.pairs) else None

    @property
    def by_client(self) -> list[float | None]:
        """Share of each client's pairs that is harmful; None for a client without pairs."""
        return [u / n if n else None for u, n in zip(self.unsafe, self.pairs, strict=True)]


@dataclasses.dataclass(frozen=True)
class Clients:
    """The clients of one seed: encoded pairs with and without the filter.

    Attributes:
      plain, filtered: encoded pairs by client; `filtered` is None without a filter.
      counts: `FilterCounts` by client.
      flagged: verdicts on the pairs before the filter, bool `[n]` by client; None where not known.
      rejected: why new answers were not taken, `{reason: number}` by client; None where not known.
      categories: `{category: (flagged, all)}` over all clients.
      quality, reliability, auroc: quality of the verdicts, as labels are known in simulation; None
        without a filter.
      threshold: P(unsafe) from which pairs were flagged.
      at_bound: whether the filter's calibration ended at a bound, see `decision.Decision`.
      make_filter: `() -> filter`; None without a filter, or for a simulated one.
      holdings: what clients hold before the filter; None where labels are not known, as at sites.
    """

    plain: Sequence[Sequence[Encoded]] | None
    filtered: Sequence[Sequence[Encoded]] | None = None
    counts: Sequence[FilterCounts] | dict[int, FilterCounts] | None = None
    flagged: Sequence[np.ndarray] | None = None
    rejected: Sequence[dict[str, int]] | None = None
    categories: dict | None = None
    quality: FilterQuality | None = None
    reliability: Reliability | None = None
    auroc: float | None = None
    threshold: float | None = None
    at_bound: bool = False
    make_filter: Callable | None = None
    holdings: Holdings | None = None

    def judge(self) -> tuple[Callable, float]:
        """Returns `(dialogues, answers) -> P(unsafe)` by the seed's filter, and its threshold."""
        return answer_risk(self.make_filter()), self.threshold

    def filtered_of(self, ids: Iterable[int]) -> dict:
        """Returns the fields of `FilterCounts`, summed over the clients of these ids; `rejected`
        counts, by reason, new answers that were not taken, where some were not."""
        ids = list(ids)
        counts = [self.counts[i] for i in ids]
        summed = {k: sum(getattr(c, k) for c in counts) for k in FilterCounts._fields}
        return summed | self._rejected_of(ids)

    def _rejected_of(self, ids: Iterable[int]) -> dict[str, dict[str, int]]:
        mine = (collections.Counter(self.rejected[i]) for i in ids if self.rejected)
        total = sum(mine, collections.Counter())
        return {"rejected": dict(total.most_common())} if total else {}

    def filter_record(self) -> dict:
        """Returns what `results.json` keeps of the filter of a seed."""
        return (
            self.quality._asdict()
            | {
                "auroc": self.auroc,
                "threshold": self.threshold,
                "calibration_at_bound": self.at_bound,
                "reliability": self.reliability._asdict(),
                "categories": self.categories,
            }
            | self._rejected_of(range(len(self.rejected or ())))
        )


def build(config: ConfigDict, inputs: RunInputs, seed: int, progress: Progress) -> Clients:
    """Encodes every client's pairs, and says loudly where clients hold less than was asked for."""
    if seed == config.seeds[0] and (packaged := packaged_beside_own(config)):
        progress.note(f"packaged data at the server, beside clients' own: {', '.join(packaged)}")
    encoded, unsafe, lost = [], [], 0
    for examples in inputs.clients[seed]:
        kept, missing = encode(inputs.lm.tokenizer, examples, config.seq_len)
        if missing:  # only now is it worth asking which ones
            lost += missing
            examples = [e for e in examples if encode(inputs.lm.tokenizer, [e], config.seq_len)[0]]
        encoded.append(kept)
        unsafe.append(sum(e.label == UNSAFE for e in examples))
    notes = dialogue_notes.count(one for kept in encoded for one in kept)
    holdings = Holdings(tuple(unsafe), tuple(map(len, encoded)), lost, notes)
    dealt = sum(map(len, inputs.clients[seed]))
    if shortfall := describe_shortfall(config, inputs, seed, dealt, holdings):
        progress.warn(shortfall)
    if lost:
        progress.warn(f"seed {seed}: {lost} pairs lost: {dialogue_notes.LOST}")
    for line in dialogue_notes.describe(notes, dealt, "pairs"):
        progress.note(f"seed {seed}: {line}")
    if empty := [i for i, n in enumerate(holdings.pairs) if not n]:
        names = ", ".join(map(str, empty))
        progress.warn(f"seed {seed}: client(s) {names} have NO DATA: all their pairs are lost")
    return Clients(encoded, holdings=holdings)


def describe_shortfall(
    config: ConfigDict, inputs: RunInputs, seed: int, dealt: int, holdings: Holdings
) -> str:
    """Says how many pairs fewer clients hold than the config asks for, and what would do.

    Args:
      config, inputs: config and inputs of the run.
      seed: seed of the run.
      dealt: pairs that were dealt out to the clients.
      holdings: what is left of these when they are encoded.

    Returns:
      A line; "" where clients were dealt what was asked for.
    """
    asked = inputs.asked[seed]
    if dealt >= asked.pairs:
        return ""
    num_safe, num_unsafe = len(inputs.safe), len(inputs.unsafe)
    instead = possible_sizes(
        num_safe, num_unsafe, asked.harmful_share, config.num_clients, config.examples_per_client
    )
    kept = "none" if holdings.harmful_share is None else f"{holdings.harmful_share:.1%} held"
    return (
        f"seed {seed}: clients hold {sum(holdings.pairs)} of {asked.pairs} pairs asked for, as "
        f"there are {num_safe} safe and {num_unsafe} unsafe ones; harmful share "
        f"{asked.harmful_share:.1%} asked, {kept}; {instead} would be held in full"
    )


def encode(
    tokenizer: "PreTrainedTokenizerBase",
    examples: Sequence[Example],
    seq_len: int,
    weights: Sequence[float] | None = None,
    refusal_word: str = "",
) -> tuple[list[Encoded], int]:
    """Encodes (prompt, response) dialogues.

    A response that turns back from a harmful answer becomes DeRTa's two rows, which share its
    weight. What is drawn of these depends on the pair alone: the same words in every round.

    Args:
      tokenizer: Hugging Face tokenizer with a chat template.
      examples: the dialogues.
      seq_len: most tokens of a dialogue.
      weights: factor on the loss of each dialogue; None for 1.
      refusal_word: `cai.refusal_word`, for responses that turn back.

    Returns:
      `(encoded, lost)`: a dialogue whose template alone fills `seq_len` has no target, and is lost.

    Raises:
      SourceError: the chat template refuses the roles of a dialogue, or their order.
    """
    if weights is None:
        weights = [1.0] * len(examples)
    encoded, lost = [], 0
    for example, weight in zip(examples, weights, strict=True):
        try:
            rows = _encode_one(tokenizer, example, seq_len, refusal_word)
        except ChatTemplateError as error:
            raise refused(example, error, "client") from error
        lost += not rows
        share = np.float32(weight / max(len(rows), 1))
        encoded += [
            row if share == 1 else row._replace(loss_mask=row.loss_mask * share) for row in rows
        ]
    return encoded, lost


def _encode_one(
    tokenizer: "PreTrainedTokenizerBase", example: Example, seq_len: int, refusal_word: str
) -> list[Encoded]:
    if example.turned:
        triple = derta.Triple(
            example.prompt, example.turned, example.response, messages=example.messages
        )
        rng = generator(Purpose.TURNS, int(content_hash(example.messages, example.turned), 16))
        return derta.both_rows(
            tokenizer,
            triple,
            rng,
            refusal=derta.refusal_token(tokenizer, refusal_word),
            max_length=seq_len,
            bare=not rng.integers(derta.ROWS_PER_BARE_ROW),
        )
    one = chat.encode(tokenizer, example.messages, example.response, seq_len)
    return [] if one is None else [one]


def describe_encoding(encoded: Sequence[Encoded], lost: int, what: str) -> list[str]:
    """Says what encoding changed and lost, in lines.

    Args:
      encoded, lost: see `encode`.
      what: what was encoded, such as "pairs".
    """
    count = len(encoded) + lost
    lines = dialogue_notes.describe(dialogue_notes.count(encoded), count, what)
    return lines + ([f"{lost} of {count} {what} lost: {dialogue_notes.LOST}"] if lost else [])


def learned(examples: Sequence[Encoded]) -> float:
    """Returns what a client learns from: the sum of its examples' weights, 0 for masked ones.

    It weighs the client in the aggregation. An optimizer such as Adam undoes a factor that all
    gradients of a client share, so the weights in the loss alone would not make it count less.

    Args:
      examples: encoded examples of the client.
    """
    return sum(float(one.loss_mask.max(initial=0)) for one in examples)
