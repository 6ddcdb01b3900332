"""Attribution: which client's update did the harm, measured as the server receives it.

Each round, for every client whose update counts, the model of the round's start with that update
alone is asked the server's own red-team prompts, the models of all clients in one batch. What it
refuses less than the global model, and how far its first tokens are from the global model's, is
the harm of the update. Nothing is trained on it, and no random stream of training is read.
"""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.flatten_util import ravel_pytree
from ml_collections import ConfigDict

from fedsafe_jax.data import chat
from fedsafe_jax.evals import judges
from fedsafe_jax.evals.task import subset
from fedsafe_jax.evals.tasks import divergence
from fedsafe_jax.federated import lora_average, simulation
from fedsafe_jax.federated.algorithms import ServerState
from fedsafe_jax.filters.actions import FilterCounts
from fedsafe_jax.inference.language_model import LanguageModel
from fedsafe_jax.models import lora
from fedsafe_jax.models.sharding import fetch
from fedsafe_jax.pipeline.evaluation import judge_tools
from fedsafe_jax.pipeline.inputs import RunInputs
from fedsafe_jax.pipeline.refusal_probe import PROBE_TOKENS
from fedsafe_jax.random_streams import Purpose
from fedsafe_jax.runtime import multihost

ROWS = 256  # answers decoded at once, of all adapters together; a cache of each is held


class Attribution:
    """The harm of each client's update in the rounds of one arm and seed.

    Args:
      config, inputs: config and inputs of the run; `federated.attribution` is how many of the
        server's red-team prompts are asked, the same in every round.
      counts: what the filter did at each client; None without a filter.
    """

    def __init__(
        self,
        config: ConfigDict,
        inputs: RunInputs,
        counts: Sequence[FilterCounts] | dict[int, FilterCounts] | None,
    ):
        self._config, self._inputs, self._counts = config, inputs, counts
        prompts = subset(inputs.red_team, config.federated.attribution, Purpose.PROBE)
        self._dialogues = [example.messages for example in prompts]
        self._updates: dict[int, np.ndarray] = {}
        # One adapter is the global one. As many in every call, so that one program is compiled.
        room = max(ROWS // len(self._dialogues) - 1, 1)
        self._at_once = min(config.clients_per_round, room)
        self._refuses = judges.refuses(config.cai.probe_judge, judge_tools(config))

    def receiver(
        self, beside: Callable[[int, np.ndarray], None] | None
    ) -> Callable[[int, np.ndarray], None]:
        """Begins a round: returns what takes the update of each client, see `rounds.run`.

        Args:
          beside: takes them too; None for nobody.
        """
        self._updates = {}

        def receive(client: int, update: np.ndarray) -> None:
            self._updates[client] = update
            if beside is not None:
                beside(client, update)

        return receive

    def measure(self, server: ServerState) -> dict:
        """Measures the updates received since the round began, which are then forgotten.

        Args:
          server: the server's state before the round, on the devices of all processes.

        Returns:
          `prompts`, their number; `global_refused`, percent of them that the global model refuses,
          None without a client; and by client, in the order of `clients`: `refused` in percent,
          `refusal_lost` to it in percentage points, `divergence`, KL(client || global) in nats, the
          mean over the first `divergence.EARLY` tokens of the global model's answers, None where
          none has a token. With a filter also `filter`, pairs `kept`, `flagged` and `dropped`.
        """
        received, self._updates = self._updates, {}
        clients = sorted(received)
        rates: list[float] = []
        divergences: list[float] = []
        global_rate = None
        for start in range(0, len(clients), self._at_once):
            some = [received[i] for i in clients[start : start + self._at_once]]
            refused, kl = self._ask(self._adapters(server, some))
            global_rate = refused[0]
            rates += refused[1 : 1 + len(some)]
            divergences += kl[1 : 1 + len(some)]
        figures = {
            "prompts": len(self._dialogues),
            "global_refused": global_rate,
            "clients": clients,
            "refused": rates,
            "refusal_lost": [global_rate - rate for rate in rates],
            "divergence": divergences,
        }
        if self._counts is not None:
            figures["filter"] = filtered([self._counts[i] for i in clients])
        return figures

    def _adapters(self, server: ServerState, updates: Sequence[np.ndarray]) -> lora.Adapter:
        """Stacks the global adapter and that with each update; the global one also fills up."""
        mesh, shape = self._inputs.mesh, self._inputs.lora
        factors, residue = fetch(multihost.local((server.factors, server.residue), mesh))
        current, unravel = ravel_pytree(factors)
        moved = np.zeros((1 + self._at_once, current.size), np.float32)
        for row, update in zip(moved[1:], updates, strict=False):
            row[:] = update

        def adapter(update):
            return lora_average.join(unravel(current + update), residue)

        stacked = simulation.replicate(fetch(jax.vmap(adapter)(moved)), mesh)
        return lora.Adapter(multihost.local(stacked, mesh), lora.config_of(stacked, shape))

    def _ask(self, adapters: lora.Adapter) -> tuple[list[float], list[float | None]]:
        """Returns percent refused, and the mean divergence from the first adapter, by adapter."""
        lm = self._inputs.lm
        answered = lm.answer_each(
            adapters, self._dialogues, max_new_tokens=PROBE_TOKENS, truncate=True
        )
        refused = [100 * float(np.mean(self._refuses(self._dialogues, a))) for a, _ in answered]
        encoded = [
            self._encoded(lm, dialogue, answer, finished)
            for dialogue, answer, finished in zip(self._dialogues, *answered[0], strict=True)
        ]
        kl = divergence.by_adapter(
            lm,
            adapters,
            encoded,
            seq=self._config.eval.max_length,
            positions=divergence.EARLY,
        )
        known = np.isfinite(kl)
        tokens = known.sum(-1)  # [adapters, prompts]
        means = np.where(known, kl, 0.0).sum(-1) / np.maximum(tokens, 1)
        answers = (tokens > 0).sum(-1)
        return refused, [
            float(total) if count else None
            for total, count in zip(means.sum(-1) / np.maximum(answers, 1), answers, strict=True)
        ]

    def _encoded(self, lm: LanguageModel, dialogue, answer: str, finished: bool):
        """Encodes a dialogue with the global model's answer; its end is a token where it ended."""
        one = chat.encode(lm.tokenizer, dialogue, answer, self._config.eval.max_length)
        return one if one is None or finished else chat.without_end(lm.tokenizer, one)


def filtered(counts: Sequence[FilterCounts]) -> dict[str, list[int]]:
    """Returns pairs that clients' filters kept, flagged and dropped, by client."""
    return {
        "kept": [c.kept for c in counts],
        "flagged": [c.dropped + c.rewritten + c.masked + c.weighted for c in counts],
        "dropped": [c.dropped for c in counts],
    }
