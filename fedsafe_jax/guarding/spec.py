"""Guards as a config or a command line names them: checked before anything is loaded."""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

from fedsafe_jax.evals.judges import HARM, Tools, make, measures
from fedsafe_jax.filters.cache import content_hash, folder_hash
from fedsafe_jax.guarding import critic, decodings, guardian
from fedsafe_jax.guarding.contract import GuardError, Risk, risk_of
from fedsafe_jax.guarding.guarded_model import Guards


class GuardSpec(NamedTuple):
    """Guards as a config or a command line names them.

    Attributes:
      decoding: see `decodings.parse`; "" for plain decoding.
      guard: spec of the judge of harm whose risk the decoding reads; "" for none.
      guardian: see `guardian.load`; "" for none.
      critic: folder of a critic, see `critic.load`; "" for none.
    """

    decoding: str = ""
    guard: str = ""
    guardian: str = ""
    critic: str = ""

    @property
    def label(self) -> str:
        """What the guards are called in results, such as "budget+guardian"; "" for none."""
        name = self.decoding.partition(":")[0]
        return "+".join(filter(None, (name, "guardian" if self.guardian else "")))

    @property
    def fingerprint(self) -> str:
        """Hash of the settings and of the files in the folders that they name.

        A guard that was trained again in the same folder gets another, so that answers which were
        given under the earlier one are not taken for its own.
        """
        named = (self.guard, self.guardian, self.critic)
        folders = [path for text in named for path in (text, _place(text)) if os.path.isdir(path)]
        return content_hash(self, [folder_hash(folder) for folder in folders])

    def check(self) -> None:
        """Finds what `load` would refuse, before anything is loaded.

        Raises:
          GuardError, JudgeError: naming what is wrong.
        """
        settings = decodings.parse(self.decoding) if self.decoding else None
        if settings is not None and settings.reads_risk and not self.guard:
            raise GuardError(
                f"decoding '{self.decoding}' reads the risk of answers: name a guard, such as "
                "guard:FOLDER."
            )
        if self.guard and (settings is None or not settings.reads_risk):
            raise GuardError(
                f"guard '{self.guard}': no decoding reads it; give decoding=budget, or one with a "
                "budget or a penalty."
            )
        if self.guard and measures(self.guard) != HARM:
            raise GuardError(f"guard '{self.guard}': it does not tell harm; give guard:FOLDER.")
        if self.critic and (settings is None or not settings.budget):
            raise GuardError(f"critic '{self.critic}': it is for a decoding with a budget.")
        if self.critic:
            critic.load(self.critic)
        if self.guardian:
            guardian.check(self.guardian)

    def load(self, load_model: Callable[..., Any], risk: Risk | None = None) -> Guards:
        """Loads the guards.

        Args:
          load_model: loads a language model by path or Hub id.
          risk: that of `guard`, where it is loaded already; None to load it.

        Raises:
          GuardError, JudgeError, FilterError, ModelError: they cannot be loaded.
        """
        self.check()
        if self.guard and risk is None:
            (judge,) = make((self.guard,), Tools(load_model))
            risk = risk_of(judge)
        return Guards(
            decoding=decodings.parse(self.decoding) if self.decoding else None,
            risk=risk,
            critic=critic.load(self.critic) if self.critic else None,
            guardian=guardian.load(self.guardian, load_model) if self.guardian else None,
        )


def _place(spec: str) -> str:
    """The folder in the spec of a judge, such as `guard:FOLDER#FORMAT`."""
    return spec.partition(":")[2].partition("#")[0]
