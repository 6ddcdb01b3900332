"""Federated fine-tuning from Python, without a config: adapters from lists of pairs."""

from collections.abc import Sequence

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
from fedsafe_jax.federated.round_programs import RoundSpec, make_round
from fedsafe_jax.inference.language_model import LanguageModel
from fedsafe_jax.models import lora, loss
from fedsafe_jax.models.decoder import Decoder
from fedsafe_jax.models.decoder_config import ModelError
from fedsafe_jax.models.lora import Adapter, LoraConfig
from fedsafe_jax.random_streams import Purpose
from fedsafe_jax.registry import look_up


def finetune(
    lm: LanguageModel,
    clients: Sequence[Sequence[tuple[str, str]]],
    *,
    rank: int = 8,
    alpha: float = 16.0,
    targets: Sequence[str] | str = ("q_proj", "v_proj"),
    rank_stabilized: bool = False,
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
      lm: the frozen base; an adapter on it is not used.
      clients: (prompt, response) pairs of each client.
      rank, alpha, targets, rank_stabilized: shape of the adapter, as in `lora.LoraConfig`; targets
        may be "all-linear".
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
      ModelError: a number is too small, a target unknown, or the dropout no share below 1.
      UnknownNameError: there is no such algorithm; the message has the nearest one.

    Examples:
      >>> import fedsafe_jax as fs
      >>> lm = fs.load_pretrained("package:model")
      >>> clients = [[("Who are you?", "I am Ada.")], [("What is your name?", "Ada.")]]
      >>> adapter = fs.finetune(lm, clients, rank=2, rounds=1, local_steps=1)
      >>> adapter.config.rank, adapter.base_model
      (2, 'package:model')
    """
    entry = look_up(ALGORITHMS, algorithm, "algorithm")
    if entry.personal:
        raise lora.ModelError(
            f"algorithm='{algorithm}': each client keeps a part of its model, and there is no "
            "global adapter to return; `fedsafe run` and `fedsafe export --client` have those of "
            "clients."
        )
    if dropout and "lora_dropout" in entry.refuses:
        raise lora.ModelError(
            f"dropout={dropout} does not go with algorithm='{algorithm}': "
            f"{entry.refuses['lora_dropout']}."
        )
    _check_sizes(
        rank=rank,
        rounds=rounds,
        local_steps=local_steps,
        batch_size=batch_size,
        clients_per_round=1 if clients_per_round is None else clients_per_round,
    )
    _check_pairs(clients, clients_per_round)
    names = lora.expand_targets(targets)
    if not 0 <= dropout < 1:
        raise lora.ModelError(f"dropout={dropout}; expected a share from 0 to below 1.")
    config = LoraConfig(rank, alpha, names, rank_stabilized=rank_stabilized, dropout=dropout)
    data = [
        [chat.encode(lm.tokenizer, (("user", p),), r, seq_len) for p, r in pairs]
        for pairs in clients
    ]
    dialogue_notes.warn([e for encoded in data for e in encoded], "pairs")
    data = [[e for e in encoded if e is not None] for encoded in data]
    for i, encoded in enumerate(data):
        if not encoded:
            raise PartitionError(f"client {i} has no pair whose prompt fits into {seq_len} tokens.")
    model = Decoder(lm.config, config.scale, config.dropout)
    mesh, count = lm.mesh or make_mesh(jax.devices()[:1]), clients_per_round or len(clients)
    parallel, shared = clients_at_once(mesh, clients_in_parallel)
    training = LocalTraining(
        loss.PackedLoss(model), make_optimizer(), mesh=shared, platform=model.config.platform
    )
    method = entry.make(training, len(clients), Hyperparameters())
    spec = RoundSpec(
        method,
        aggregation.make("mean"),
        normalize_steps=entry.normalize_steps,
        product_weights=entry.weighting == "product_norm",
    )
    programs = make_round(spec, mesh, parallel)
    factors = lora.init(random_streams.key(Purpose.ADAPTER, seed), lm.config, config)
    state = simulation.initial_state(programs, factors, len(clients))
    sizes, rates = [len(encoded) for encoded in data], [learning_rate] * local_steps
    chunk = simulation.chunk_size(count, mesh)
    for t in range(rounds):
        cohort = draw_cohort(
            seed, t, sizes, count=count, local_steps=local_steps, weighting=entry.weighting
        )
        batches = RoundBatches(
            data,
            seed,
            t,
            ids=cohort.ids,
            steps=cohort.steps,
            local_steps=local_steps,
            batch_size=batch_size,
            seq=seq_len,
            noise=bool(dropout),
        )
        state, _ = simulation.run_round(
            programs,
            state,
            lm.params,
            batches=batches.chunk,
            cohort=cohort,
            rates=rates,
            chunk=chunk,
            rows=batches.filled,
            key=random_streams.key(Purpose.FRESH_SLOTS, seed, t),
        )
    adapter = jax.device_get(state.server.adapter)
    return Adapter(adapter, lora.config_of(adapter, config), lm.name)


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
