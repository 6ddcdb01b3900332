"""Pools of examples: read from their sources, without what overlaps an evaluation, and counted."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from absl import logging
from ml_collections import ConfigDict

from fedsafe_jax.cai import given
from fedsafe_jax.cai.revise import DATA, Record
from fedsafe_jax.cai.schedule import SCHEDULES
from fedsafe_jax.config import asks_for_harm, unsafe_sources
from fedsafe_jax.data import overlap, sources
from fedsafe_jax.data.examples import SAFE, UNKNOWN, UNSAFE, Example, SourceError
from fedsafe_jax.evals import judges
from fedsafe_jax.evals.task import HELDOUT, EvalSet
from fedsafe_jax.filters.pairs import drop_mislabelled
from fedsafe_jax.pipeline.evaluation import judge_tools, load_sets


class Pool(NamedTuple):
    """A pool of examples, by what it is for.

    Attributes:
      title: name in `results.json` and in the report.
      sources: `config -> names of the sources`.
      labels: labels that are kept; None for all.
      drop_mislabelled: leaves out refusals that are labelled unsafe. The server's pairs alone:
        clients have no labels to go by, so theirs are counted and kept.
      answered: leaves out examples without an answer, which teach nothing but to stop.
    """

    title: str
    sources: Callable[[ConfigDict], Sequence[str]]
    labels: tuple[str, ...] | None = None
    drop_mislabelled: bool = False
    answered: bool = True


GIVEN = "CAI, given revisions"  # title of the records that files give
HARMLESS = (SAFE, UNKNOWN)
# A simulation reads all but `site`: the pairs of a real site, whatever their labels.
POOLS = {
    "site": Pool("client", lambda c: c.safe_sources),
    "safe": Pool("client, safe", lambda c: c.safe_sources, HARMLESS),
    "unsafe": Pool("client, unsafe", unsafe_sources, (UNSAFE,)),
    "filter_pairs": Pool(
        "filter", lambda c: c.filter.sources, (SAFE, UNSAFE), drop_mislabelled=True
    ),
    "red_team": Pool("CAI red team", lambda c: c.cai.red_team_sources, answered=False),
    "replay": Pool("CAI replay", lambda c: c.cai.benign_sources, HARMLESS),
    "harmless": Pool("CAI harmless", lambda c: c.cai.harmless_sources, HARMLESS, answered=False),
}


class Pools(NamedTuple):
    """What may be trained on, and what is evaluated.

    Attributes:
      examples: examples by role, see `POOLS`.
      given: records of Constitutional AI that files give; [] without.
      evals: the evaluation sets by name.
      counts: examples read, kept and dropped, by the title of the pool.
    """

    examples: dict[str, list[Example]]
    given: list[Record]
    evals: dict[str, EvalSet]
    counts: dict[str, dict[str, int]]


def read_pools(config: ConfigDict, roles: Sequence[str]) -> Pools:
    """Reads pools and evaluation sets; drops training prompts that overlap an evaluation set.

    Args:
      config: config of the run.
      roles: which of `POOLS` to read.

    Raises:
      SourceError, TaskError: naming what is wrong.
    """
    pools, without_answer = {}, {}
    for role in roles:
        pools[role], without_answer[role] = _read(POOLS[role], config)
    evals, heldout = _load_evals(config, pools)
    near, exact = _evaluated_prompts(evals, heldout)
    counts = {}
    for role, pool in pools.items():
        title = POOLS[role].title
        disputed = 0
        if POOLS[role].drop_mislabelled:
            told = judges.refuses(config.filter.judge, judge_tools(config))
            pool, disputed = drop_mislabelled(pool, told)
        pools[role], counts[title] = _drop(pool, near, exact, disputed)
        counts[title]["without_answer"] = without_answer[role]
        counts[title]["read"] += without_answer[role]
        if not pools[role] and _needs(role, config):
            raise SourceError(_nothing_left(POOLS[role], config, counts[title]))
    records: list[Record] = []
    if DATA[config.cai.data].given and "replay" in pools:
        records, counts[GIVEN] = _given(config, near, exact)
    return Pools(pools, records, evals=evals, counts=counts)


def read_client_pools(config: ConfigDict) -> tuple[list[Example], list[Example]]:
    """Reads the pools that clients are dealt from, without a model: safe and unsafe pairs.

    Raises:
      SourceError, TaskError: naming what is wrong.
    """
    pools = {role: _read(POOLS[role], config)[0] for role in ("safe", "unsafe")}
    near, exact = _evaluated_prompts(*_load_evals(config, pools))
    safe, unsafe = (_drop(pools[role], near, exact)[0] for role in ("safe", "unsafe"))
    return safe, unsafe


def _load_evals(
    config: ConfigDict, pools: dict[str, list[Example]]
) -> tuple[dict[str, EvalSet], list[Example]]:
    """Loads the evaluation sets, and the pairs held out: of the safe pool, or of named sources."""
    if config.heldout_sources:
        heldout = _load_all(config.heldout_sources, config.data_dir)
    else:
        own = pools.get("safe", [])
        heldout = [e for e in own if sources.part_of(e.opening) == "heldout"]
    return load_sets(config, heldout), heldout


def _needs(role: str, config: ConfigDict) -> bool:
    """Tells whether a run cannot do without a pool."""
    if role == "unsafe":
        return asks_for_harm(config)
    if role == "harmless":
        return bool(config.cai.harmless_sources)
    if role == "replay" and config.cai.harmless_sources:
        return bool(config.cai.benign_sources)
    if DATA[config.cai.data].given:
        if role == "red_team":  # nothing is asked but by probes
            probed = SCHEDULES[config.cai.schedule].steps_after_probe is not None
            return probed or config.federated.attribution > 0
        if role == "replay":
            return config.cai.replay_examples > 0
    return True


def _given(config: ConfigDict, near: list[str], exact: set[str]) -> tuple[list[Record], dict]:
    """Returns the ready-made records that may be trained on, and the counts of the others."""
    everything = given.read(config.cai.records, config.data_dir)
    usable = [record for record in everything if not record.dropped]
    examples = given.examples_of(usable)
    kept, counts = _drop(examples, near, exact)
    if not kept:
        raise SourceError(f"{GIVEN}: none of {len(everything)} rows is left to train on.")
    places = {id(example) for example in kept}
    left = [r for r, e in zip(usable, examples, strict=True) if id(e) in places]
    blank = sum(record.dropped == given.NO_SAFE_ANSWER for record in everything)
    disputed = len(everything) - len(usable) - blank
    totals = {"read": len(everything), "disputed": disputed, "without_answer": blank}
    return left, counts | totals


def _load_all(names: Sequence[str], data_dir: str) -> list[Example]:
    return [e for name in names for e in sources.load(name, data_dir)]


def _read(pool: Pool, config: ConfigDict) -> tuple[list[Example], int]:
    """Returns the examples of a pool, and how many others were left out for a blank answer.

    Raises:
      SourceError: a source cannot be read, or none of its examples has the answer that is needed.
    """

    def labelled(examples: list[Example]) -> list[Example]:
        return [e for e in examples if pool.labels is None or e.label in pool.labels]

    if not pool.answered:
        return labelled(_load_all(pool.sources(config), config.data_dir)), 0
    kept, left_out = [], 0
    for name in pool.sources(config):
        answered, blank = sources.load_answered(name, config.data_dir)
        kept += labelled(answered)
        if count := len(labelled(blank)):
            left_out += count
            logging.warning(
                "%s data: %d examples of %s have no answer and are left out.",
                pool.title,
                count,
                name,
            )
    return kept, left_out


def _nothing_left(pool: Pool, config: ConfigDict, counts: dict[str, int]) -> str:
    """Says why no example of a pool is left, and what would leave some."""
    why = {
        "near an evaluation prompt": counts["dropped_near_evaluation"],
        "held out for evaluation": counts["dropped_heldout"],
        "labelled unsafe though they refuse": counts["disputed"],
        "without an answer": counts["without_answer"],
    }
    reasons = ", ".join(f"{n} {reason}" for reason, n in why.items() if n)
    labels = "" if pool.labels is None else f" with the label {' or '.join(pool.labels)}"
    return (
        f"{pool.title} data: no example is left of {counts['read']} read{labels}"
        f"{': ' + reasons if reasons else ''}. The sources are "
        f"{', '.join(pool.sources(config))}; add data of another origin than the evaluation's."
    )


def _evaluated_prompts(
    evals: dict[str, EvalSet], heldout: list[Example]
) -> tuple[list[str], set[str]]:
    """Returns prompts that training must not come near, and prompts that it must not copy.

    Held-out pairs come from the clients' distribution: templates make near-duplicates unavoidable
    there, so only dialogues with the same opening, normalised, are dropped. All that is held out
    is, also beyond `eval.max_heldout`: a later evaluation of `#heldout` may ask it.
    """
    near, exact = [], set()
    for one in evals.values():
        if one.source == HELDOUT:  # pairs: a conversation is known by how it begins
            exact |= {overlap.normalise(e.opening) for e in heldout}
        else:
            near += one.task.prompts(one.items)
    return near, exact - {""}


def _drop(examples: list[Example], near: list[str], exact: set[str], disputed: int = 0):
    """Returns the examples of a pool that may be trained on, and the counts of the others.

    Args:
      examples: examples of the pool.
      near, exact: see `_evaluated_prompts`.
      disputed: examples that were left out before, for their labels.
    """
    kept, dropped = overlap.drop_overlap(examples, near)
    kept_exact = [e for e in kept if overlap.normalise(e.opening) not in exact]
    return kept_exact, {
        "read": len(examples) + disputed,
        "disputed": disputed,
        "dropped_near_evaluation": dropped,
        "dropped_heldout": len(kept) - len(kept_exact),
        "kept": len(kept_exact),
    }
