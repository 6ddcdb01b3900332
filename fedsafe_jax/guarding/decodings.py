"""Decodings by their specs: "budget", "best_of_n:candidates=16,penalty=5".

A decoding is a name with the sizes that it starts from; a spec changes some of them.
"""

import math
from typing import NamedTuple

from fedsafe_jax.guarding.contract import GuardError
from fedsafe_jax.registry import unknown


class Search(NamedTuple):
    """Sizes of a search over answers, see `search.search`.

    Attributes:
      candidates: continuations that are tried in a block, for each prompt.
      keep: of these how many go on.
      block: tokens of a block; 0 for whole answers.
      temperature: divisor of the logits that continuations are drawn from; 0 for the likeliest,
        with one candidate.
      budget: the most cost that an answer may have, in nats of -log P(safe): 0.69 asks for a
        probability of one half. 0 for no bound.
      gamma: discount of the budget a token: what is left grows by `1 / gamma`.
      penalty: nats of reward that a nat of cost counts for.
      retries: how often a block is drawn again where no candidate is within the budget.
      frequency: by how much a block that is drawn again lowers the logit of a token, for each time
        that a failed candidate has it, on average over the candidates.
    """

    candidates: int = 8
    keep: int = 2
    block: int = 16
    temperature: float = 1.0
    budget: float = 0.0
    gamma: float = 1.0
    penalty: float = 0.0
    retries: int = 0
    frequency: float = 1.0

    @property
    def reads_risk(self) -> bool:
        """Whether a guard decides."""
        return bool(self.budget or self.penalty)


HALF = math.log(2)  # the cost of an answer that is as likely safe as not
DECODINGS: dict[str, Search] = {
    # Whole answers, of which the best is taken (Stiennon et al., 2020).
    "best_of_n": Search(keep=1, block=0),
    # Blocks, of which the best go on.
    "beam": Search(),
    # InferenceGuard (Ji et al., 2025, arXiv 2502.01208).
    "budget": Search(budget=HALF, retries=2),
    # The model's own answer, until a guard that reads along says stop.
    "stop": Search(candidates=1, keep=1, block=8, temperature=0.0, budget=HALF),
}
# The least value of each field.
_LEAST = {
    "candidates": 1,
    "keep": 1,
    "block": 0,
    "temperature": 0,
    "budget": 0,
    "penalty": 0,
    "retries": 0,
    "frequency": 0,
}


def parse(spec: str) -> Search:
    """Returns the search of a spec, `NAME` or `NAME:FIELD=NUMBER,FIELD=NUMBER`.

    Raises:
      GuardError: an unknown name or field, or a number that makes no sense; it is named.
    """
    name, _, given = str(spec).partition(":")
    if name not in DECODINGS:
        raise GuardError(unknown("decoding", name, DECODINGS))
    search = DECODINGS[name]
    for part in filter(None, given.split(",")):
        field, _, value = part.partition("=")
        if field not in Search._fields:
            raise GuardError(unknown(f"decoding '{spec}': field", field, Search._fields))
        kind = Search.__annotations__[field]
        try:
            search = search._replace(**{field: kind(value)})
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise GuardError(f"decoding '{spec}': {field} must be {what}, not '{value}'.") from None
    return checked(spec, search)


def checked(spec: str, search: Search) -> Search:
    """Returns a search whose sizes make sense.

    Raises:
      GuardError: naming the field.
    """

    def wrong(what: str) -> GuardError:
        return GuardError(f"decoding '{spec}': {what}")

    for field, least in _LEAST.items():
        value = getattr(search, field)
        if not least <= value < math.inf:
            raise wrong(f"{field}={value}: expected {least} or more.")
    if not 0 < search.gamma <= 1:
        raise wrong(f"gamma={search.gamma}: expected more than 0, and at most 1.")
    if search.keep > search.candidates:
        raise wrong(f"keep={search.keep}: only candidates={search.candidates} can go on.")
    if search.candidates % search.keep:
        raise wrong(
            f"candidates={search.candidates}: expected a multiple of keep={search.keep}, as each "
            "that goes on is continued equally often."
        )
    if search.temperature == 0 and (search.candidates > 1 or search.retries):
        raise wrong("temperature=0: all candidates would be the same; give one, and retries=0.")
    if search.retries and not search.budget:
        raise wrong("retries are for a budget; give budget=NATS, or retries=0.")
    return search
