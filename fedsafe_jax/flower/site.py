"""What a site does: filters pairs of its own, trains the adapter on them, keeps its state.

Nothing of Flower is needed here; `client` binds it.
"""

from typing import NamedTuple

import jax
import numpy as np
from etils import epath
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from fedsafe_jax.config import ConfigError
from fedsafe_jax.federated import simulation
from fedsafe_jax.federated.algorithms import ServerState
from fedsafe_jax.federated.round_programs import ChunkInputs
from fedsafe_jax.federated.schedules import step_rates
from fedsafe_jax.filters.actions import FilterCounts
from fedsafe_jax.filters.cache import content_hash, folder_hash
from fedsafe_jax.inference.language_model import model_folder
from fedsafe_jax.models import lora
from fedsafe_jax.models.decoder import Decoder
from fedsafe_jax.models.sharding import CLIENTS
from fedsafe_jax.pipeline import filtering, rounds
from fedsafe_jax.pipeline.arms import arms_of
from fedsafe_jax.pipeline.clients import encode
from fedsafe_jax.pipeline.filtering import apply_action
from fedsafe_jax.pipeline.inputs import load_inputs
from fedsafe_jax.validation import validate

BASE_FILES = ("*.safetensors", "config.json", "tokenizer.json")  # what makes a base the same


class Settings(NamedTuple):
    """Of a site, from its operator.

    Attributes:
      client: number of the site, 0 to `num_clients - 1`, each once.
      sources: of the site's pairs, as in `data.sources`.
      data_dir: folder that locations are relative to.
      workdir: of the site's scores, compiled programs and state.
      model: folder of the base model; "" for the one that the config names.
      filter: folder of a filter to use; "" for what the config says.
    """

    client: int
    sources: tuple[str, ...]
    data_dir: str
    workdir: str
    model: str = ""
    filter: str = ""


def settings_of(node_config: dict) -> Settings:
    """Reads `flower-supernode --node-config`.

    Raises:
      ConfigError: a key is missing, unknown or of another type.
    """
    names = {field.replace("_", "-"): field for field in Settings._fields}
    given = {k: v for k, v in node_config.items() if k not in ("partition-id", "num-partitions")}
    for key in given.keys() - names.keys():
        raise ConfigError(f"--node-config {key}: no such key; expected {', '.join(names)}.")
    for key in ("client", "sources", "data-dir", "workdir"):
        if key not in given:
            raise ConfigError(
                f"--node-config: {key} is missing; a site needs client (its number, from 0 on), "
                "sources, data-dir and workdir."
            )
    if not isinstance(given["client"], int):
        raise ConfigError(f"--node-config client={given['client']!r}: expected a number from 0 on.")
    fields = {names[key]: value for key, value in given.items()}
    return Settings(**fields | {"sources": tuple(str(fields["sources"]).split(","))})


def base_fingerprint(model: str) -> str:
    """Of the files that make a base model what it is."""
    return folder_hash(model_folder(model), BASE_FILES)


class Update(NamedTuple):
    """What a site sends after its local steps; leaves lead with `[1]`, as of one client.

    Attributes:
      sent, metrics: see `federated.round`.
      useful_tokens: of its batches, padding not counted.
    """

    sent: object
    metrics: object
    useful_tokens: int


class Site:
    """A site within one federation.

    Args:
      config: of the run, from the server.
      own: settings of the site.
      note: told in a line what is going on.

    Raises:
      ConfigError, SourceError, ModelError, FilterError: naming what is wrong at this site.
    """

    def __init__(self, config, own: Settings, note=lambda text: None):
        validate(config)
        if not 0 <= own.client < config.num_clients:
            raise ConfigError(
                f"--node-config client={own.client}: this run has num_clients={config.num_clients}."
            )
        config.safe_sources, config.data_dir = own.sources, own.data_dir
        config.model = own.model or config.model
        config.filter.load = own.filter or config.filter.load
        self.config, self.own = config, own
        self.folder = epath.Path(own.workdir) / content_hash(config.to_dict())
        (arm,) = (arm for arm in arms_of(config) if arm.trains)
        (self.seed,), (self.algorithm,) = config.seeds, config.algorithms
        trains_filter = arm.filter and not config.filter.load
        self.inputs = load_inputs(config, ("site", "filter_pairs") if trains_filter else ("site",))
        pairs = self.inputs.site
        if arm.filter:
            note(filtering.describe(config.filter, len(self.inputs.filter_pairs)))
            scores = self.folder / "filter_scores"
            scored = filtering.score_pairs(config, self.inputs, pairs, self.seed, scores)
            (left,) = apply_action(config, self.inputs, [pairs], scored, self.seed)
            pairs, weights, self.counts = left.examples, left.weights, left.counts
        else:
            weights = None
            self.counts = FilterCounts(
                **dict.fromkeys(FilterCounts._fields, 0) | {"kept": len(pairs)}
            )
        self.encoded, _ = encode(self.inputs.lm.tokenizer, pairs, config.seq_len, weights)
        note(f"client {own.client}: {len(self.encoded)} pairs to train on")
        model = Decoder(self.inputs.lm.config, self.inputs.lora.scale)
        self.programs = rounds.build(config, self.algorithm, model, self.inputs.mesh)

    def describe(self) -> dict:
        """What the server is told before the first round: counts, and of which base."""
        # Whether a pair is unsafe is known in simulation only.
        counts = {k: v for k, v in self.counts._asdict().items() if not k.startswith("unsafe")}
        return {
            "client": self.own.client,
            "examples": len(self.encoded),
            "base": base_fingerprint(self.config.model),
            "data": self.inputs.counts["client"],
            "filter": counts,
        }

    def template(self) -> dict:
        """Shapes of what the server sends: `{"adapter": ..., "control": ...}`."""
        adapter = jax.eval_shape(
            lambda: lora.init(jax.random.key(0), self.inputs.lm.config, self.inputs.lora)
        )
        server = jax.eval_shape(self.programs.spec.algorithm.init, adapter)
        return {"adapter": server.factors, "control": server.control}

    def train(self, server: dict, t: int, steps: int) -> Update:
        """The local steps of round `t`, those of a simulated client with this number.

        Args:
          server: arrays as in `template`.
          t: the round, from 0.
          steps: that this client gets done.
        """
        config, mine = self.config, self.own.client
        batches = rounds.local_batches(
            config, {mine: self.encoded}, self.seed, t=t, ids=[mine], steps=[steps]
        )
        width = self.programs.mesh.shape[CLIENTS]
        batch = batches.chunk(0, width)
        adapter = jax.tree.map(np.asarray, server["adapter"])
        state = jax.tree.map(
            lambda x: np.concatenate([x[None], np.zeros((width - 1, *x.shape), x.dtype)]),
            self._state_before(t, adapter),
        )
        first = np.arange(width) == 0  # further devices get padding
        inputs = ChunkInputs(
            batch,
            first.astype(np.float32),
            np.ones(width, np.float32),
            ranks=np.full(width, np.iinfo(np.int32).max, np.int32),
            states=state,
            residuals=(),
        )
        whole = simulation.replicate(ServerState(adapter, server["control"], ()), self.inputs.mesh)
        rates = step_rates(rounds.learning_rates(config), t)
        sent, state, _, metrics = self.programs.train(whole, self.inputs.base, inputs, rates)
        found = jax.device_get((sent, state, metrics))
        sent, state, metrics = jax.tree.map(lambda x: x[:1], found)
        self._keep_state(t, state)
        return Update(sent, metrics, int((batch.segment_ids > 0).sum()))

    def _states(self) -> dict[int, epath.Path]:
        """Files of the client's state by the round that they came from, in order."""
        found = (self.folder / "state").glob("round_*.safetensors")
        return dict(sorted((int(path.stem.removeprefix("round_")), path) for path in found))

    def _state_before(self, t: int, adapter):
        """What the client keeps (SCAFFOLD's control), as it was before round `t`: a server that was
        stopped repeats rounds."""
        start = self.programs.spec.algorithm.init_client(adapter)
        if not jax.tree.leaves(start):
            return start
        before = [path for done, path in self._states().items() if done < t]
        if not before:
            return jax.tree.map(np.asarray, start)
        return traverse_util.unflatten_dict(load_file(before[-1]), sep=".")

    def _keep_state(self, t: int, state) -> None:
        if not jax.tree.leaves(state):
            return
        folder = self.folder / "state"
        folder.mkdir(parents=True, exist_ok=True)
        flat = traverse_util.flatten_dict(state, sep=".")
        temporary = folder / "new.tmp"
        save_file({name: np.ascontiguousarray(x[0]) for name, x in flat.items()}, temporary)
        temporary.replace(folder / f"round_{t:04d}.safetensors")
        # Those a resumed server may go back to, and the one before.
        for done, path in list(self._states().items())[: -self.config.checkpoint_every - 1]:
            if done < t - self.config.checkpoint_every:
                path.unlink()
