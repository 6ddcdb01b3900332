"""Models that are served under guards: whole answers to dialogues, or nothing."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from fedsafe_jax.data.examples import Messages
from fedsafe_jax.inference.language_model import LanguageModel
from fedsafe_jax.inference.sampling import Sampling
from fedsafe_jax.models import lora
from fedsafe_jax.serving.served_models import Draw, ServedModels


class Guarded(Protocol):
    """A model under guards, see `guarding.guarded_model.GuardedModel`."""

    def answer_ids(
        self,
        dialogues: Sequence[Messages],
        max_new_tokens: int,
        sampling: Sampling,
        *,
        seed: int,
        batch_size: int,
    ) -> list[tuple[list[int], bool]]:
        """Returns the token ids of each answer, and whether it is finished."""


class GuardedModels(ServedModels):
    """A base model and its adapters under guards.

    An answer is told when it is whole, as a guard may still put another in its place. What no
    dialogue is given of, and what scores the model's own tokens, is refused (`is_guarded`).

    Args:
      lm, name, adapters, options: see `ServedModels`.
      guarded: puts a model under guards.
    """

    is_guarded = True

    def __init__(
        self,
        lm: LanguageModel,
        name: str,
        adapters: Mapping[str, lora.Adapter],
        guarded: Callable[[LanguageModel], Guarded],
        **options: Any,
    ):
        super().__init__(lm, name, adapters, **options)
        self._guarded = {key: guarded(one) for key, one in self._models.items()}

    def generate(
        self, models: Sequence[str], sampling: Sampling, draws: Sequence[Draw]
    ) -> Iterator[list[tuple[list[int], bool]]]:
        """Answers dialogues, each under its model, at once; see `ServedModels.generate`.

        Those of one request are answered as `answer_dialogues` answers them with its seed.
        """
        end = next(iter(self.stop_ids), None)
        together: dict[tuple[str, int, int, Messages], list[int]] = {}
        for i, (model, draw) in enumerate(zip(models, draws, strict=True)):
            key = (model, draw.seed, draw.max_tokens, tuple(draw.dialogue))
            together.setdefault(key, []).append(i)
        answers: list[tuple[list[int], bool]] = [([], True)] * len(draws)
        for (model, seed, most, dialogue), members in together.items():
            # All places up to the last, as a sample depends on its place: of a request whose
            # answers are in several batches some are drawn twice.
            said = self._guarded[model].answer_ids(
                [dialogue] * (1 + max(draws[i].place for i in members)),
                most,
                sampling,
                seed=seed,
                batch_size=self._batch_size,
            )
            for i in members:
                ids, finished = said[draws[i].place]
                ended = [end] if finished and end is not None else []
                answers[i] = ([*ids, *ended], True)
        yield answers
