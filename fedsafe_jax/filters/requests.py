"""Filters that read requests alone: what they learn from labelled pairs, and how they are marked.

They stand in front of a model that has not answered yet, see `guarding.guardian`. A client's pairs
are not theirs to judge: a refusal and compliance are the same to them.
"""

from collections.abc import Sequence

from fedsafe_jax.data.examples import SAFE, UNSAFE, Example
from fedsafe_jax.filters.pairs import Refuses

PAIR, REQUEST = READS = ("pair", "request")  # what a filter reads, `config.reads`


def of_pairs(pairs: Sequence[Example], refuses: Refuses) -> list[Example]:
    """Returns each request once, without an answer, in the order in which they come.

    A request is unsafe where any answer to it is labelled unsafe. One whose answers all refuse is
    left out: they are safe, and say nothing about what was asked.

    Args:
      pairs: labelled pairs.
      refuses: judge of refusal.
    """
    safe = [pair for pair in pairs if pair.label == SAFE]
    said = refuses([pair.messages for pair in safe], [pair.response for pair in safe])
    answered = {pair.messages for pair, refused in zip(safe, said, strict=True) if not refused}
    unsafe = {pair.messages for pair in pairs if pair.label == UNSAFE}
    by_request: dict[tuple, Example] = {}
    for pair in pairs:
        if pair.messages in unsafe or pair.messages in answered:
            label = UNSAFE if pair.messages in unsafe else SAFE
            by_request.setdefault(pair.messages, pair._replace(response="", label=label))
    return list(by_request.values())
