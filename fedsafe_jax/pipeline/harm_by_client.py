"""Who did the harm, from what `attribution` measured in all rounds: by client, and ranked.

Where attackers are simulated, each figure of a client is a signal, and how well it ranks them first
is measured.
"""

import collections
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fedsafe_jax.evals import ranking


class Signal(NamedTuple):
    """A figure by which clients are ranked.

    Attributes:
      field: its field of a client, see `by_client`.
      sign: 1 where more of it is suspicious, -1 where less is.
    """

    field: str
    sign: int = 1


SIGNALS = {
    "refusal_lost": Signal("refusal_lost"),
    "divergence": Signal("relative_divergence"),
    "norm": Signal("relative_norm"),
    "cosine": Signal("cosine", -1),
    "flagged": Signal("flagged_share"),
}


def _of_round(row: Mapping[str, Any]) -> Iterator[dict]:
    """Yields the figures of each client in a round, from its row of metrics.

    Lengths and divergences fall with the learning rate: beside the median of the round's clients
    those of several rounds compare.
    """
    harm = row["attribution"]
    norms = dict(zip(row["clients"], row["delta_norms"], strict=True))
    cosines = dict(zip(row["clients"], row["cosines"], strict=True))
    middle_norm = _median([norms[i] for i in harm["clients"]])
    middle = _median(harm["divergence"])
    for place, client in enumerate(harm["clients"]):
        moved, norm = harm["divergence"][place], norms[client]
        figures = {
            "client": client,
            "refused": harm["refused"][place],
            "refusal_lost": harm["refusal_lost"][place],
            "divergence": moved,
            "relative_divergence": None if moved is None else moved / middle,
            "relative_norm": None if norm is None else norm / middle_norm,
            "cosine": cosines[client],
        }
        if "filter" in harm:
            kept, flagged = (harm["filter"][name][place] for name in ("kept", "flagged"))
            share = flagged / (kept + flagged) if kept + flagged else None
            figures |= {"kept": kept, "flagged": flagged, "flagged_share": share}
        if "malicious" in row:
            figures["malicious"] = client in row["malicious"]
        yield figures


def _median(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return (float(np.median(known)) if known else 0.0) or 1.0


def by_client(rows: Sequence[Mapping[str, Any]]) -> list[dict]:
    """Returns each client's mean figures over the rounds that it took part in.

    Args:
      rows: rows of metrics of one arm and seed, with `attribution`.

    Returns:
      A dict a client, in the order of their numbers: `client`, `rounds`, the means of the figures
      of `attribution`, `relative_divergence` and `relative_norm` to the median of the
      round's clients, `cosine`, with a filter `kept`, `flagged` and `flagged_share`, and
      `malicious` where that is known.
    """
    rounds = collections.defaultdict(list)
    for row in rows:
        for figures in _of_round(row):
            rounds[figures["client"]].append(figures)
    table = []
    for client, seen in sorted(rounds.items()):
        line: dict[str, Any] = {"client": client, "rounds": len(seen)}
        for name in seen[0]:
            if name in ("client", "malicious"):
                continue
            known = [figures[name] for figures in seen if figures[name] is not None]
            line[name] = float(np.mean(known)) if known else None
        if "malicious" in seen[0]:
            line["malicious"] = seen[0]["malicious"]
        table.append(line)
    return table


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict]:
    """Returns what `results.json` says of who did the harm, by arm.

    Args:
      rows: lines of `metrics.jsonl`; those without `attribution` are left out.

    Returns:
      By arm `clients`, the rows of `by_client` of each seed with its `seed`; where malicious
      clients are known, also `signals`: of each name of `SIGNALS` that the arm has, how well
      clients' means over the run rank the malicious ones first (`auroc`, `ci95`, `per_seed`), and
      `by_round`, the same in each round, the mean over the seeds whose cohort has both kinds.
    """
    arms = collections.defaultdict(lambda: collections.defaultdict(list))
    for row in rows:
        if "attribution" in row:
            arms[row["arm"]][row["seed"]].append(row)
    return {arm: _of_arm(seeds) for arm, seeds in arms.items()}


def _of_arm(seeds: Mapping[int, list[dict]]) -> dict:
    tables = {seed: by_client(rows) for seed, rows in seeds.items()}
    lines = [{"seed": seed} | line for seed, table in tables.items() for line in table]
    summary: dict[str, Any] = {"clients": lines}
    if not lines or "malicious" not in lines[0]:
        return summary
    cohorts = collections.defaultdict(list)
    for rows in seeds.values():
        for row in rows:
            cohorts[row["round"]].append(list(_of_round(row)))
    summary["signals"] = {
        name: rank(list(tables.values()), signal)._asdict()
        | {"by_round": [rank(cohorts[t], signal).auroc for t in sorted(cohorts)]}
        for name, signal in SIGNALS.items()
        if signal.field in lines[0]
    }
    return summary


def rank(tables: Sequence[Sequence[Mapping[str, Any]]], signal: Signal) -> ranking.Ranking:
    """Measures how well a signal ranks malicious clients first.

    Args:
      tables: figures of each client, by seed; a client without a figure is left out.
      signal: which figure.
    """
    known = [[line for line in table if line[signal.field] is not None] for table in tables]
    return ranking.ranking(
        [[line["malicious"] for line in table] for table in known],
        [[signal.sign * line[signal.field] for line in table] for table in known],
    )
