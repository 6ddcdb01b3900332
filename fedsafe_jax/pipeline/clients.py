"""The clients of one seed: who holds which pairs, and what the filter leaves of them."""

import dataclasses
from collections.abc import Callable

import numpy as np
from etils import epath

from fedsafe_jax.data import chat
from fedsafe_jax.data.sources import UNSAFE
from fedsafe_jax.filters import actions
from fedsafe_jax.filters import quality as rates
from fedsafe_jax.pipeline import filtering, rounds
from fedsafe_jax.pipeline.inputs import encode_all


@dataclasses.dataclass
class Clients:
    """The clients of one seed: encoded data with and without the filter.

    Attributes:
      plain, filtered: encoded pairs by client.
      counts: `FilterCounts` by client.
      categories: `{category: (flagged, all)}` over all clients.
      quality, reliability, auroc: of the verdicts, as labels are known in simulation; None without
        a filter.
      threshold: that pairs were flagged from.
      make_filter: `() -> filter`; None without one, or for a simulated one.
    """

    plain: list
    filtered: list | None = None
    counts: list | None = None
    categories: dict | None = None
    quality: rates.FilterQuality | None = None
    reliability: rates.Reliability | None = None
    auroc: float | None = None
    threshold: float | None = None
    make_filter: Callable | None = None

    def judge(self):
        """`((prompts, answers) -> P(unsafe), threshold)` of the seed's filter."""
        return filtering.answer_risk(self.make_filter()), self.threshold

    def filter_record(self) -> dict:
        """What `results.json` keeps of a seed."""
        return self.quality._asdict() | {
            "auroc": self.auroc,
            "threshold": self.threshold,
            "reliability": self.reliability._asdict(),
            "categories": self.categories,
        }


def build_clients(config, world, seed: int, workdir: epath.Path, progress) -> Clients:
    """Partitions the pools, trains the filter once, and filters every client's pairs."""
    split = rounds.split(config, world.safe, world.unsafe, seed)
    asked, held = config.num_clients * config.examples_per_client, sum(map(len, split))
    if held < asked and not config.size_sigma:
        progress.note(f"seed {seed}: clients hold {held} of {asked} pairs asked for: no more data")
    encoded = [encode_all(world, examples, config.seq_len) for examples in split]
    plain, lost = [e for e, _ in encoded], sum(n for _, n in encoded)
    if lost:
        progress.note(f"seed {seed}: {lost} pairs lost, their prompts alone fill seq_len")
    if not any("filter" in arm for arm in config.arms):
        return Clients(plain)
    progress.note(f"seed {seed}: {filtering.describe(config.filter, len(world.filter_pairs))}")
    everything = [e for examples in split for e in examples]
    scored = filtering.score(config, world, everything, seed, workdir / "filter_scores")
    filtered, counts, categories = [], [], {}
    for found in act(config, world, split, scored, seed):
        filtered.append(encode_weighted(world, found, config.seq_len))
        counts.append(found.counts)
        for name, (flagged, seen) in found.by_category.items():
            before = categories.get(name, (0, 0))
            categories[name] = (before[0] + flagged, before[1] + seen)
    unsafe = [e.label == UNSAFE for e in everything]
    measured = rates.quality(unsafe, scored.probability >= scored.threshold)
    progress.note(
        f"filter: recall {measured.recall:.1f}%, precision {measured.precision:.1f}%, "
        f"threshold {scored.threshold:.2f}"
    )
    return Clients(
        plain,
        filtered,
        counts,
        categories,
        measured,
        rates.reliability(unsafe, scored.probability),
        rates.auroc(unsafe, scored.probability),
        scored.threshold,
        scored.make_filter,
    )


def act(config, world, split, scored: filtering.Scored, seed: int) -> list[actions.Filtered]:
    """What the filter leaves of each client's pairs, which `scored` holds one after another."""
    action = config.filter.action
    rewrite = filtering.rewriter(config, world, scored, seed) if action == "rewrite" else None
    stops = np.cumsum([len(examples) for examples in split])
    mine = np.split(scored.probability, stops[:-1])
    return [
        actions.apply(action, examples, p, scored.threshold, rewrite)
        for examples, p in zip(split, mine, strict=True)
    ]


def encode_weighted(world, found: actions.Filtered, seq_len: int) -> list[chat.Encoded]:
    """Encoded pairs whose learned tokens carry the pair's weight."""
    out = []
    for example, weight in zip(found.examples, found.weights, strict=True):
        encoded = chat.encode(world.lm.tokenizer, example.messages, example.response, seq_len)
        if encoded is not None:
            weighted = encoded.learned if weight == 1 else encoded.learned * np.float32(weight)
            out.append(encoded._replace(learned=weighted))
    return out
