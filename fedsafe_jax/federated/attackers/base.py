"""The contract of an attacker: what malicious clients send in place of what they have learned."""

from collections.abc import Callable
from typing import NamedTuple


class Attacker(NamedTuple):
    """An entry of `ATTACKERS`.

    Attributes:
      factor: `attack.boost -> factor` that each malicious client multiplies its update by, before
        compression and clipping.
      collude: `(updates float32 [clients, params], malicious bool [clients], honest bool
        [clients]) -> updates`, jittable: what malicious clients that see the whole cohort make of
        it, as the server receives it, after compression and clipping. Clients that do not count
        are neither honest nor malicious, and only malicious rows may change. None: they see
        nobody.
    """

    factor: Callable[[float], float]
    collude: Callable | None = None
