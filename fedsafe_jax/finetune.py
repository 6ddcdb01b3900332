"""Federated fine-tuning from Python, without a config: adapters from lists of pairs."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from fedsafe_jax import random_streams
from fedsafe_jax.data import chat, dialogue_notes
from fedsafe_jax.data.batches import RoundBatches
from fedsafe_jax.data.partition import PartitionError
from fedsafe_jax.federated import aggregation, simulation
from fedsafe_jax.federated.algorithms import ALGORITHMS, Hyperparameters
from fedsafe_jax.federated.client import LocalTraining, make_optimizer
from fedsafe_jax.federated.mesh import clients_at_once, make_mesh
from fedsafe_jax.federated.participation import draw_cohort
from fedsafe_jax.federated.round_programs import Programs, RoundSpec, make_round
from fedsafe_jax.inference.language_model import LanguageModel
from fedsafe_jax.models import lora, loss
from fedsafe_jax.models.decoder import Decoder
from fedsafe_jax.models.decoder_config import ModelError
from fedsafe_jax.models.lora import Adapter, LoraConfig
from fedsafe_jax.random_streams import Purpose
from fedsafe_jax.registry import look_up

FRESH, ADAPTER = "fresh", "adapter"  # what training starts from
SHAPE = LoraConfig(rank=8, alpha=16.0, targets=("q_proj", "v_proj"))  # of a fresh adapter


def finetune(
    lm: LanguageModel,
    clients: Sequence[Sequence[tuple[str, str]]],
    *,
    start: str = "",
    rank: int = SHAPE.rank,
    alpha: float = SHAPE.alpha,
    targets: Sequence[str] | str = SHAPE.targets,
    rank_stabilized: bool = SHAPE.rank_stabilized,
    dropout: float = 0.0,
    algorithm: str = "fedavg",
    rounds: int = 5,
    clients_per_round: int | None = None,
    local_steps: int = 10,
    batch_size: int = 8,
    seq_len: int = 256,
    learning_rate: float = 1e-3,
    clients_in_parallel: int = 0,
    seed: int = 0,
) -> Adapter:
    """Trains one adapter on several clients' pairs, without filter and Constitutional AI.

    `fedsafe run` does the whole method, with evaluation, checkpoints and a report.

    Args:
      lm: the model; its parameters are frozen.
      clients: (prompt, response) pairs of each client.
      start: "fresh": a fresh adapter in the place of one that may be on the model; "adapter": the
        one that is on it is trained on, with its own shape. It need not be said of a model without
        an adapter.
      rank, alpha, targets, rank_stabilized: shape of a fresh adapter, as in `lora.LoraConfig`;
        targets may be "all-linear".
      dropout: share of the adapter's inputs that is dropped in training, 0 to below 1.
      algorithm: a name in `federated.algorithms.ALGORITHMS`.
      rounds: rounds of training and aggregation.
      clients_per_round: clients sampled for each round; None for all.
      local_steps: steps of a client in a round.
      batch_size: pairs a step.
      seq_len: tokens of a packed row; longer pairs are cut.
      learning_rate: learning rate of AdamW on the clients.
      clients_in_parallel: clients of its own that a device trains at once; 0: all devices share the
        rows of all clients.
      seed: seed of initialisation, sampling and order.

    Returns:
      The global adapter, for `lm.with_adapter` and `save_adapter`.

    Raises:
      PartitionError: there is no client, a client has no pair that fits into `seq_len`, or what it
        holds are no pairs of texts.
      ModelError: a number is too small, a target unknown, or the dropout no share below 1; the
        model has an adapter, and `start` does not say what becomes of it, or it has none to go on
        from; or a shape is given that the adapter that is trained on does not have.
      UnknownNameError: there is no such algorithm; the message has the nearest one.

    Examples:
      >>> import fedsafe_jax as fs
      >>> lm = fs.load_pretrained("package:model")
      >>> clients = [[("Who are you?", "I am Ada.")], [("What is your name?", "Ada.")]]
      >>> adapter = fs.finetune(lm, clients, rank=2, rounds=1, local_steps=1)
      >>> adapter.config.rank, adapter.base_model
      (2, 'package:model')
    """
    _check_sizes(rounds=rounds)
    training = _set_up(
        lm,
        clients,
        start=start,
        shape=LoraConfig(rank, alpha, targets, rank_stabilized=rank_stabilized, dropout=dropout),
        algorithm=algorithm,
        clients_per_round=clients_per_round,
        local_steps=local_steps,
        batch_size=batch_size,
        seq_len=seq_len,
        learning_rate=learning_rate,
        clients_in_parallel=clients_in_parallel,
        seed=seed,
    )
    state = training.start
    for t in range(rounds):
        state, _ = training.round(state, t)
    return training.adapter(state)


def adapters_by_step(
    lm: LanguageModel,
    pairs: Sequence[tuple[str, str]],
    steps: Sequence[int],
    *,
    start: str = "",
    batch_size: int = 8,
    seq_len: int = 256,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> tuple[list[Adapter], np.ndarray]:
    """Trains one adapter on one user's pairs, and returns it after several numbers of steps.

    An optimizer lives as long as a client's round. So each number of steps is a training from the
    start, whose first steps are those of a shorter one: the adapter of `n` steps is that of
    `finetune` with `rounds=1` and `local_steps=n`, by one compiled program for all of them.

    Args:
      lm, start, batch_size, seq_len, learning_rate, seed: as in `finetune`; a fresh adapter has the
        shape that is default there.
      pairs: (prompt, response) pairs.
      steps: numbers of steps, at least 1.

    Returns:
      The adapters in the order of `steps`, and float32 `[max(steps)]`, the loss of each step before
      it is taken, nats a target token.

    Raises:
      PartitionError, ModelError: as `finetune`.
    """
    for count in steps:
        _check_sizes(steps=count)
    training = _set_up(
        lm,
        [pairs],
        start=start,
        shape=SHAPE,
        algorithm="fedavg",
        clients_per_round=None,
        local_steps=max(steps),
        batch_size=batch_size,
        seq_len=seq_len,
        learning_rate=learning_rate,
        clients_in_parallel=0,
        seed=seed,
    )
    adapters, losses = [], np.zeros(0, np.float32)
    for count in steps:
        state, report = training.round(training.start, 0, most=count)
        adapters.append(training.adapter(state))
        losses = max(losses, report.losses[0][:count], key=len)
    return adapters, losses


class _Training(NamedTuple):
    """A training that is ready: its programs, and what clients hold."""

    lm: LanguageModel
    programs: Programs
    start: simulation.FederatedState
    config: LoraConfig
    data: list[list[chat.Encoded]]
    weighting: str
    clients_per_round: int
    local_steps: int
    batch_size: int
    seq_len: int
    learning_rate: float
    seed: int

    def round(
        self, state: simulation.FederatedState, t: int, most: int | None = None
    ) -> tuple[simulation.FederatedState, simulation.RoundReport]:
        """Takes round `t`; `most` local steps of it, None for all."""
        cohort = draw_cohort(
            self.seed,
            t,
            [len(encoded) for encoded in self.data],
            count=self.clients_per_round,
            local_steps=self.local_steps,
            weighting=self.weighting,
        )
        if most is not None:
            cohort = cohort._replace(steps=np.minimum(cohort.steps, most))
        batches = RoundBatches(
            self.data,
            self.seed,
            t,
            ids=cohort.ids,
            steps=cohort.steps,
            local_steps=self.local_steps,
            batch_size=self.batch_size,
            seq=self.seq_len,
            noise=bool(self.config.dropout),
        )
        return simulation.run_round(
            self.programs,
            state,
            self.lm.params,
            batches=batches.chunk,
            cohort=cohort,
            rates=[self.learning_rate] * self.local_steps,
            chunk=simulation.chunk_size(self.clients_per_round, self.programs.mesh),
            rows=batches.filled,
            key=random_streams.key(Purpose.FRESH_SLOTS, self.seed, t),
        )

    def adapter(self, state: simulation.FederatedState) -> Adapter:
        """Returns the global adapter of a state."""
        factors = jax.device_get(state.server.adapter)
        return Adapter(factors, lora.config_of(factors, self.config), self.lm.name)


def _set_up(
    lm: LanguageModel,
    clients: Sequence[Sequence[tuple[str, str]]],
    *,
    start: str,
    shape: LoraConfig,
    algorithm: str,
    clients_per_round: int | None,
    local_steps: int,
    batch_size: int,
    seq_len: int,
    learning_rate: float,
    clients_in_parallel: int,
    seed: int,
) -> _Training:
    """Checks the arguments of `finetune`, and makes what its rounds need."""
    entry = look_up(ALGORITHMS, algorithm, "algorithm")
    if entry.personal:
        raise lora.ModelError(
            f"algorithm='{algorithm}': each client keeps a part of its model, and there is no "
            "global adapter to return; `fedsafe run` and `fedsafe export --client` have those of "
            "clients."
        )
    if shape.dropout and "lora_dropout" in entry.refuses:
        raise lora.ModelError(
            f"dropout={shape.dropout} does not go with algorithm='{algorithm}': "
            f"{entry.refuses['lora_dropout']}."
        )
    _check_sizes(
        rank=shape.rank,
        local_steps=local_steps,
        batch_size=batch_size,
        clients_per_round=1 if clients_per_round is None else clients_per_round,
    )
    _check_pairs(clients, clients_per_round)
    shape = shape._replace(targets=lora.expand_targets(shape.targets))
    if not 0 <= shape.dropout < 1:
        raise lora.ModelError(f"dropout={shape.dropout}; expected a share from 0 to below 1.")
    trained_on = _trained_on(lm, start, shape)
    config = (trained_on.config if trained_on else shape)._replace(dropout=shape.dropout)
    data = [
        [chat.encode(lm.tokenizer, (("user", p),), r, seq_len) for p, r in pairs]
        for pairs in clients
    ]
    dialogue_notes.warn([e for encoded in data for e in encoded], "pairs")
    data = [[e for e in encoded if e is not None] for encoded in data]
    for i, encoded in enumerate(data):
        if not encoded:
            raise PartitionError(f"client {i} has no pair whose prompt fits into {seq_len} tokens.")
    model, mesh = Decoder(lm.config, config.scale, config.dropout), lm.mesh
    mesh = mesh or make_mesh(jax.devices()[:1])
    parallel, shared = clients_at_once(mesh, clients_in_parallel)
    training = LocalTraining(
        loss.PackedLoss(model), make_optimizer(), mesh=shared, platform=model.config.platform
    )
    spec = RoundSpec(
        entry.make(training, len(clients), Hyperparameters()),
        aggregation.make("mean"),
        normalize_steps=entry.normalize_steps,
        product_weights=entry.weighting == "product_norm",
    )
    programs = make_round(spec, mesh, parallel)
    if trained_on:
        factors = trained_on.factors
    else:
        factors = lora.init(random_streams.key(Purpose.ADAPTER, seed), lm.config, config)
    return _Training(
        lm,
        programs,
        simulation.initial_state(programs, factors, len(clients)),
        config=config,
        data=data,
        weighting=entry.weighting,
        clients_per_round=clients_per_round or len(clients),
        local_steps=local_steps,
        batch_size=batch_size,
        seq_len=seq_len,
        learning_rate=learning_rate,
        seed=seed,
    )


def _trained_on(lm: LanguageModel, start: str, given: LoraConfig) -> Adapter | None:
    """Returns the adapter that training goes on from; None where it begins with a fresh one.

    Args:
      lm: the model.
      start: as in `finetune`.
      given: the shape that was asked for, or the default one.
    """
    if start not in ("", FRESH, ADAPTER):
        raise ModelError(f"start={start!r}: expected '{FRESH}' or '{ADAPTER}'.")
    if lm.adapter is None and start == ADAPTER:
        raise ModelError(f"start='{ADAPTER}': there is no adapter on the model; leave it out.")
    if lm.adapter is not None and not start:
        raise ModelError(
            f"start: there is an adapter on the model; say '{ADAPTER}' to train it on, or "
            f"'{FRESH}' for a fresh one in its place."
        )
    if start != ADAPTER:
        return None
    given, own, default = (
        shape._replace(targets=tuple(sorted(shape.targets)))
        for shape in (given, lm.adapter.config, SHAPE)
    )
    for name in ("rank", "alpha", "targets", "rank_stabilized"):
        asked, has = getattr(given, name), getattr(own, name)
        if asked not in (getattr(default, name), has):
            raise ModelError(
                f"{name}={asked!r}: the adapter that is trained on has {has!r}; leave it out."
            )
    return lm.adapter


def _check_sizes(**numbers: int) -> None:
    for name, value in numbers.items():
        whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if not whole or value < 1:
            raise ModelError(f"{name}={value!r}: expected a whole number, at least 1.")


def _check_pairs(clients: Sequence, clients_per_round: int | None) -> None:
    if not len(clients):
        raise PartitionError("clients: no client is given; expected a list of pairs for each.")
    if clients_per_round is not None and clients_per_round > len(clients):
        raise PartitionError(
            f"clients_per_round={clients_per_round} exceeds the {len(clients)} clients; lower it."
        )
    for i, pairs in enumerate(clients):
        if isinstance(pairs, str):
            raise PartitionError(f"client {i} is a text; expected a list of (prompt, response).")
        for k, pair in enumerate(pairs):
            is_pair = isinstance(pair, tuple | list) and len(pair) == 2
            if not is_pair or not all(isinstance(text, str) for text in pair):
                raise PartitionError(
                    f"client {i}, pair {k}: expected (prompt, response), two texts, not "
                    f"{repr(pair)[:60]}."
                )
