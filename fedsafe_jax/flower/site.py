"""A site: filters its own pairs, trains the adapter on them, and keeps its client state.

This module does not need Flower; `client` binds it.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import ml_collections
import numpy as np
from etils import epath
from flax import traverse_util
from safetensors import SafetensorError
from safetensors.numpy import load_file

from fedsafe_jax import own_folder, random_streams
from fedsafe_jax.config import ConfigError
from fedsafe_jax.federated import simulation
from fedsafe_jax.federated.algorithms import ServerState
from fedsafe_jax.federated.client import LocalSteps
from fedsafe_jax.federated.round_programs import ChunkInputs, ClientMetrics, ClientUpdates
from fedsafe_jax.federated.schedules import step_rates
from fedsafe_jax.filters.actions import FilterCounts
from fedsafe_jax.filters.cache import content_hash, folder_hash
from fedsafe_jax.flower import site_policy
from fedsafe_jax.flower.site_policy import SettingsError, SiteSettings
from fedsafe_jax.models import lora
from fedsafe_jax.models.base_model import model_folder
from fedsafe_jax.models.decoder import Decoder
from fedsafe_jax.models.sharding import CLIENTS
from fedsafe_jax.models.tensor_files import save_file
from fedsafe_jax.pipeline import filtering, round_setup, rounds
from fedsafe_jax.pipeline.arms import arms_of
from fedsafe_jax.pipeline.clients import describe_encoding, encode, learned
from fedsafe_jax.pipeline.filtering import apply_action
from fedsafe_jax.pipeline.inputs import load_inputs
from fedsafe_jax.random_streams import Purpose
from fedsafe_jax.validation import validate
from fedsafe_jax.whole_files import WorkdirError, make_folder, storage

# Two base models are the same when these files are: weights, and what makes a dialogue into tokens
# and ends an answer. Which of them a model has differs; one that is missing is part of the hash.
BASE_FILES = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json", "tokenizer.model", "vocab.json", "vocab.txt",
    "merges.txt",
)  # fmt: skip


def base_fingerprint(model: str) -> str:
    """Hashes the files of a base model that must be the same at the server and all sites."""
    return folder_hash(model_folder(model), BASE_FILES)


class Update(NamedTuple):
    """Result of a site's local steps; all arrays have a leading axis `[1]`, the client's.

    Attributes:
      sent, metrics: see `federated.round_programs`.
      useful_tokens: tokens of the site's batches, padding not counted.
    """

    sent: ClientUpdates
    metrics: ClientMetrics
    useful_tokens: int


class Site:
    """A site within one federation.

    Args:
      config: config of the run, from the server; the site's settings replace fields of it.
      settings: settings of the site.
      note: takes a line about what the site does.
      federation: name of the federation, see `wire.config_record`.

    Raises:
      PolicyError: the config names what the operator does not allow.
      ConfigError, SourceError, ModelError, FilterError: naming what is wrong at this site.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        settings: SiteSettings,
        note: Callable[[str], None] = lambda text: None,
        federation: str = "",
    ):
        # First: a check may open what a field names.
        for line in site_policy.apply(config, settings):
            note(line)
        validate(config)
        if not 0 <= settings.client < config.num_clients:
            raise SettingsError(
                f"--node-config client={settings.client}: this run has "
                f"num_clients={config.num_clients}."
            )
        config.safe_sources, config.data_dir = settings.sources, settings.data_dir
        self.config, self.settings = config, settings
        # Named by the config, so that another federation never reads this one's scores or state.
        own_folder.claim_workdir(settings.workdir)
        self.folder = epath.Path(settings.workdir) / content_hash(config.to_dict(), federation)
        trained = [arm for arm in arms_of(config) if arm.trains]
        if not len(config.seeds) == len(config.algorithms) == len(trained) == 1:
            raise ConfigError(
                f"seeds={tuple(config.seeds)}, algorithms={tuple(config.algorithms)}, "
                f"arms={tuple(config.arms)}: a federation trains one arm, once."
            )
        (arm,), (self.seed,), (self.algorithm,) = trained, config.seeds, config.algorithms
        trains_filter = arm.filter and not config.filter.load
        self.inputs = load_inputs(config, ("site", "filter_pairs") if trains_filter else ("site",))
        pairs = self.inputs.site
        if arm.filter:
            note(filtering.describe(config.filter, len(self.inputs.filter_pairs)))
            scores = self.folder / "filter_scores"
            scored = filtering.score_pairs(config, self.inputs, pairs, self.seed, scores)
            (filtered,) = apply_action(config, self.inputs, [pairs], scored, self.seed)
            pairs, weights, self.counts = filtered.examples, filtered.weights, filtered.counts
            if said := filtering.describe_rejected([filtered.rejected]):
                note(f"client {settings.client}: {said}")
        else:
            weights = None
            self.counts = FilterCounts(
                **dict.fromkeys(FilterCounts._fields, 0) | {"kept": len(pairs)}
            )
        self.encoded, lost = encode(
            self.inputs.lm.tokenizer,
            pairs,
            config.seq_len,
            weights,
            refusal_word=config.cai.refusal_word,
        )
        for line in describe_encoding(self.encoded, lost, "pairs"):
            note(f"client {settings.client}: {line}")
        note(f"client {settings.client}: {len(self.encoded)} pairs to train on")
        lora_config = self.inputs.lora
        model = Decoder(self.inputs.lm.config, lora_config.scale, lora_config.dropout)
        self.programs = round_setup.build(config, self.algorithm, model, self.inputs.mesh)

    def describe(self) -> dict:
        """Returns what the server learns before the first round: counts, and the base model."""
        # Whether a pair is unsafe is known in simulation only.
        counts = {k: v for k, v in self.counts._asdict().items() if not k.startswith("unsafe")}
        return {
            "client": self.settings.client,
            "examples": len(self.encoded),
            "learned": learned(self.encoded),
            "base": base_fingerprint(self.config.model),
            "data": self.inputs.counts["client"],
            "filter": counts,
        }

    def template(self) -> dict:
        """Shapes of the server's message: `{"adapter": LoRA factors, "control": SCAFFOLD's}`."""
        factors = jax.eval_shape(
            lambda: lora.init(
                random_streams.key(Purpose.SHAPES, 0), self.inputs.lm.config, self.inputs.lora
            )
        )
        server = jax.eval_shape(self.programs.spec.algorithm.init, factors)
        return {"adapter": server.factors, "control": server.control}

    def train(self, server: dict, t: int, steps: int) -> Update:
        """Trains the local steps of round `t`, the same as a simulated client with this number.

        Args:
          server: arrays as in `template`.
          t: the round, from 0.
          steps: local steps that this client completes.

        Raises:
          ConfigError: the run has no such round, or its rounds have fewer steps.
        """
        for name, value, most in (
            ("round", t, self.config.rounds - 1),
            ("steps", steps, self.config.local_steps),
        ):
            if type(value) is not int or not 0 <= value <= most:
                raise ConfigError(f"{name}={value!r}: expected 0 to {most}.")
        config, mine = self.config, self.settings.client
        batches = rounds.local_batches(
            config, {mine: self.encoded}, self.seed, t=t, ids=[mine], steps=[steps]
        )
        width = self.programs.mesh.shape[CLIENTS]
        batch = batches.chunk(0, width)
        factors = jax.tree.map(np.asarray, server["adapter"])
        state = jax.tree.map(
            lambda x: np.concatenate([x[None], np.zeros((width - 1, *x.shape), x.dtype)]),
            self._state_before(t, factors),
        )
        first = np.arange(width) == 0  # one client for all devices: the others train padding
        inputs = ChunkInputs(
            batch,
            first.astype(np.float32),
            np.ones(width, np.float32),
            ranks=np.full(width, np.iinfo(np.int32).max, np.int32),
            states=state,
            residuals=(),
        )
        whole = simulation.replicate(ServerState(factors, server["control"], ()), self.inputs.mesh)
        rates = step_rates(rounds.learning_rates(config), t)
        local = LocalSteps(rates, self.programs.slots(batches.filled, width))
        sent, state, _, metrics = self.programs.train(whole, self.inputs.base, inputs, local)
        sent, state, metrics = jax.tree.map(lambda x: x[:1], jax.device_get((sent, state, metrics)))
        self._keep_state(t, state)
        return Update(sent, metrics, int((batch.segment_ids > 0).sum()))

    def _states(self) -> dict[int, epath.Path]:
        """Files of the client's state by the round that wrote them, in order."""
        paths = (self.folder / "state").glob("round_*.safetensors")
        return dict(sorted((int(path.stem.removeprefix("round_")), path) for path in paths))

    def _state_before(self, t: int, factors):
        """Reads the client's state (SCAFFOLD's control) as it was before round `t`.

        A server that was stopped repeats rounds, so the newest state may be too new.
        """
        start = self.programs.spec.algorithm.init_client(factors)
        if not jax.tree.leaves(start):
            return start
        before = [path for done, path in self._states().items() if done < t]
        if not before:
            return jax.tree.map(np.asarray, start)
        with storage(before[-1], "cannot be read"):
            try:
                return traverse_util.unflatten_dict(load_file(before[-1]), sep=".")
            except SafetensorError as error:
                # Another state would be another algorithm: a person decides.
                raise WorkdirError(
                    f"{before[-1]}: the state of this client is damaged ({error}); put the file "
                    "back, or begin the federation anew."
                ) from None

    def _keep_state(self, t: int, state) -> None:
        if not jax.tree.leaves(state):
            return
        folder = self.folder / "state"
        make_folder(folder)
        flat = traverse_util.flatten_dict(state, sep=".")
        tensors = {name: np.ascontiguousarray(x[0]) for name, x in flat.items()}
        with storage(folder):
            save_file(tensors, folder / f"round_{t:04d}.safetensors")
        # Kept are the states that a resumed server may go back to, and the one before these.
        for done, path in list(self._states().items())[: -self.config.checkpoint_every - 1]:
            if done < t - self.config.checkpoint_every:
                path.unlink()
