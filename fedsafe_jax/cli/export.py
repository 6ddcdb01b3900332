"""Exports the adapter of any arm and seed of a run, finished or not, or its merged model.

    fedsafe export --workdir=DIR --arm=ARM --seed=N [--round=T] [--client=K] [--scale=S] [--merge]
        --output=DIR

The adapter lies in the folder itself: `PeftModel.from_pretrained(base, DIR)` and vLLM load it. A
run keeps its `checkpoint_keep` newest rounds, and with `keep_updates` what clients sent in them.
"""

import math
from typing import Any

import jax
import numpy as np
from absl import flags
from etils import epath
from ml_collections import ConfigDict

from fedsafe_jax import whole_files
from fedsafe_jax.cli.command import Command, UsageError, check_folder
from fedsafe_jax.config import default_config


def define_flags(values: flags.FlagValues) -> None:
    """Defines the command's flags."""
    text, whole = flags.DEFINE_string, flags.DEFINE_integer
    here = {"flag_values": values}
    text("workdir", None, "Folder of the run, local or gs://BUCKET/FOLDER.", **here)
    text("arm", None, "Arm, as results.json names it, such as fl or fedavg/fl.", **here)
    whole("seed", None, "Seed; may be left out where the run has one.", **here)
    whole("round", None, "Rounds done, from 1; the newest that is kept if left out.", **here)
    whole("client", None, "What this client sent in the round, not the server's model.", **here)
    flags.DEFINE_float("scale", 1.0, "Factor of the adapter's effect, above 0; 1: as is.", **here)
    flags.DEFINE_bool("merge", False, "Write the merged model, not the adapter.", **here)
    text("output", None, "New or empty folder, local or gs://BUCKET/FOLDER.", **here)


def run_config(workdir: epath.Path) -> ConfigDict:
    """Reads the config of a run; fields that its version did not have get their defaults.

    Raises:
      UsageError: the workdir holds no run, or a damaged `config.json`.
      StorageError: the file cannot be read.
    """
    from fedsafe_jax.runtime import run_files

    try:
        content = run_files.read_config(workdir)
    except ValueError as error:
        path = workdir / "config.json"
        raise UsageError(f"--workdir: {path} is damaged ({error}).") from None
    if content is None:
        raise UsageError(f"--workdir={workdir}: no config.json; give the folder of a run.")
    known = default_config().to_dict()
    groups = {k: v | content.get(k, {}) for k, v in known.items() if isinstance(v, dict)}
    return ConfigDict(known | content | groups)


def choose(names: list, given: Any, flag: str, what: str) -> Any:
    """Returns the given one of some names; where there is one name, it need not be given.

    Raises:
      UsageError: it is not there; the message lists those that are.
    """
    if given is None and len(names) == 1:
        return names[0]
    if given not in names:
        problem = "missing" if given is None else "not there"
        there = ", ".join(map(str, names)) or "none"
        written = f"--{flag}" if given is None else f"--{flag}={given}"
        raise UsageError(f"{written}: {problem}; {what}: {there}.")
    return given


class Saved:
    """What a workdir keeps of one arm and seed.

    Args:
      workdir: folder of the run.
      arm: id of the arm.
      seed: seed, None for the only one.

    Raises:
      UsageError: there is no such run, arm or seed, or it has no checkpoint.
    """

    def __init__(self, workdir: str, arm: str, seed: int | None):
        from fedsafe_jax import random_streams
        from fedsafe_jax.federated.algorithms import ALGORITHMS
        from fedsafe_jax.models import hub, lora
        from fedsafe_jax.models.base_model import model_folder
        from fedsafe_jax.pipeline.arms import planned_arms
        from fedsafe_jax.pipeline.round_setup import arm_config, state_shapes
        from fedsafe_jax.runtime import checkpoint, run_files
        from fedsafe_jax.runtime.client_updates import ClientUpdates

        self.workdir = epath.Path(workdir)
        self.config = run_config(self.workdir)
        arms = {one.id: one for one in planned_arms(self.config) if one.arm.trains}
        self.planned = arms[choose(list(arms), arm, "arm", "arms that are trained")]
        self.seed = choose(list(self.config.seeds), seed, "seed", "seeds of the run")
        place = {"arm": self.planned.folder, "seed": self.seed}
        self._folder = run_files.arm_folder(self.workdir, "checkpoints", **place)
        self._updates = ClientUpdates(run_files.arm_folder(self.workdir, "updates", **place))
        self.rounds = checkpoint.rounds_of(self._folder)
        if not self.rounds:
            begun = [one for one in arms.values() for s in self.config.seeds if self._has(one, s)]
            names = ", ".join(dict.fromkeys(one.id for one in begun)) or "none"
            raise UsageError(
                f"--arm={arm} --seed={self.seed}: no checkpoint in {self._folder} yet; arms that "
                f"have one: {names}."
            )
        self.lora = lora.LoraConfig(
            self.config.lora_rank,
            self.config.lora_alpha,
            lora.expand_targets(self.config.lora_targets),
            rank_stabilized=self.config.lora_rank_stabilized,
            dropout=self.config.lora_dropout,
        )
        shape = hub.read_config(model_folder(self.config.model), self.config.dtype)
        factors = jax.eval_shape(
            lambda: lora.init(
                random_streams.key(random_streams.Purpose.SHAPES, 0), shape, self.lora
            )
        )
        self._of_arm = arm_config(self.config, self.planned.arm)
        self._like = state_shapes(self._of_arm, self.planned.algorithm, factors)
        entry = ALGORITHMS.get(self.planned.algorithm)
        self.personal = entry is not None and entry.personal is not None

    def _has(self, planned: Any, seed: int) -> bool:
        from fedsafe_jax.runtime import checkpoint, run_files

        folder = run_files.arm_folder(self.workdir, "checkpoints", planned.folder, seed)
        return bool(checkpoint.rounds_of(folder))

    def round(self, given: int | None) -> int:
        """Returns the round asked for, the newest for None.

        Raises:
          UsageError: it was not kept; the message names those that were.
        """
        if given is None:
            return self.rounds[-1]
        what = f"kept with checkpoint_keep={self.config.checkpoint_keep} are the rounds"
        return choose(self.rounds, given, "round", what)

    def factors(self, rounds_done: int) -> dict:
        """Returns the LoRA factors of the server's model after a round, with those of a residue.

        Raises:
          UsageError: the checkpoint is damaged, or does not fit the config; or there is no global
            model.
        """
        if self.personal:
            raise UsageError(
                f"--client: missing; under {self.planned.algorithm} each client has a model of "
                f"its own, 0 to {self.config.num_clients - 1}."
            )
        return self._read(rounds_done, self._like.server).adapter

    def _read(self, rounds_done: int, like: Any) -> Any:
        from fedsafe_jax.runtime import checkpoint

        try:
            return checkpoint.read_factors(self._folder, rounds_done, like)
        except checkpoint.CheckpointError as error:
            raise UsageError(f"--round={rounds_done}: {error}") from None

    def _personal_factors(self, rounds_done: int, client: int) -> dict:
        """Returns a client's model: the global factors with those that it keeps."""
        from fedsafe_jax.federated.algorithms import ALGORITHMS

        choose(list(range(self.config.num_clients)), client, "client", "clients of the run")
        state = self._read(rounds_done, self._like)
        own = jax.tree.map(lambda x: x[client], state.clients["states"])
        personal = ALGORITHMS[self.planned.algorithm].personal
        return jax.tree.map(np.asarray, personal(state.server.factors, own))

    def client_factors(self, rounds_done: int, client: int) -> dict:
        """Returns the factors that the server received from a client in a round; the client's own
        model, where clients keep a part of it.

        Raises:
          UsageError: they were not kept; the message names what was.
        """
        if self.personal:
            return self._personal_factors(rounds_done, client)
        from fedsafe_jax.federated.lora_average import join, rank_mask, split
        from fedsafe_jax.pipeline.clients import roles

        rounds = [t for t in self._updates.rounds() if t in self.rounds]
        if rounds_done not in rounds:
            kept = ", ".join(map(str, rounds)) or "none"
            raise UsageError(
                f"--client={client}: no updates of round {rounds_done} were kept "
                f"(keep_updates={self.config.keep_updates}); rounds with updates: {kept}."
            )
        what = f"clients whose updates of round {rounds_done} were kept"
        choose(self._updates.clients(rounds_done), client, "client", what)
        start, update = self._updates.read(rounds_done, client)
        start, residue = split(start, update)
        if self._of_arm.federated.client_ranks:
            mask = rank_mask(start, roles(self._of_arm, self.seed).ranks[client])
            start = jax.tree.map(lambda x, m: np.asarray(x * m), start, mask)
        own = jax.tree.map(np.add, start, update)
        return jax.tree.map(np.asarray, join(own, residue))


def check_output(output: str) -> None:
    """Makes the output folder.

    Raises:
      UsageError: it holds something, or cannot be written.
    """
    folder = epath.Path(output)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UsageError(f"--output={output}: is there and not empty; name a new folder.")
    check_folder("output", output)


def main(values: flags.FlagValues) -> None:
    """Writes the adapter or the merged model, and prints how to load it."""
    from fedsafe_jax.inference.pretrained import load_pretrained
    from fedsafe_jax.models import lora
    from fedsafe_jax.models.adapter_hash import adapter_hash
    from fedsafe_jax.pipeline import export

    saved = Saved(values.workdir, values.arm, values.seed)
    config, rounds_done = saved.config, saved.round(values.round)
    scale = _checked_scale(values.scale)
    if values.client is None:
        factors = saved.factors(rounds_done)
    else:
        factors = saved.client_factors(rounds_done, values.client)
    note = _note(saved, rounds_done, values.client, scale)
    factors = _scaled(factors, scale)
    check_output(values.output)
    card = export.card_of_seed(
        config,
        saved.workdir,
        saved.planned,
        seed=saved.seed,
        adapter_sha256=adapter_hash(factors),
        note=note,
        of_client=values.client is not None,
    )
    adapter = lora.Adapter(factors, lora.config_of(factors, saved.lora), config.model)
    lm = None
    if values.merge:
        lm = load_pretrained(
            config.model,
            config.dtype,
            config.quantization,
            chat_template=config.chat_template,
            chat_template_kwargs=config.chat_template_kwargs.to_dict(),
            date=config.date,
        )
    output = epath.Path(values.output)
    with whole_files.storage(output), export.local_folder(output) as folder:
        if lm is not None:
            export.write_merged(lm.with_adapter(adapter), folder, card)
        else:
            export.write_adapter(adapter, folder, card)
    what = "merged model" if values.merge else "adapter"
    whose = "" if values.client is None else f", client {values.client}"
    print(f"{what} of {saved.planned.id}, seed {saved.seed}, round {rounds_done}{whose}: ", end="")
    print(values.output)


def _checked_scale(scale: float) -> float:
    if not 0 < scale < math.inf:
        raise UsageError(f"--scale={scale}: expected a finite number above 0; 1 exports as it is.")
    return scale


def _scaled(factors: dict, scale: float) -> dict:
    """Multiplies the products of factors; another alpha would leave the adapter's hash as it is."""

    def scaled(path: tuple, x: jax.Array) -> jax.Array:
        return scale * x if path[-1].key == "b" else x

    return factors if scale == 1 else jax.tree_util.tree_map_with_path(scaled, factors)


def _note(saved: Saved, rounds_done: int, client: int | None, scale: float) -> str:
    """What the card says of an adapter that is not an arm's final model as evaluated, else ""."""
    what = ""
    if client is not None and saved.personal:
        what = f"The model of client {client} after round {rounds_done}."
    elif client is not None:
        what = f"What client {client} sent in round {rounds_done}."
    elif rounds_done != saved.config.rounds:
        what = f"The model after round {rounds_done} of {saved.config.rounds}."
    if scale != 1:
        what = f"{what} The adapter's effect is multiplied by {scale:g}.".lstrip()
    return what and f"{what} It was not evaluated."


COMMAND = Command(define_flags, main, required=("workdir", "arm", "output"))
