"""What clients sent in the rounds that are kept: `round_<T>/client_<K>.safetensors` in a folder.

Each file holds one client's update as named tensors, and `start.safetensors` the factors that the
round began with: factors and update add up to the client's adapter. Files appear whole, and a round
that is repeated after a kill writes the same bytes again.
"""

import hashlib
import re
from collections.abc import Callable, Collection
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from etils import epath
from flax import traverse_util

from fedsafe_jax import whole_files
from fedsafe_jax.runtime import multihost

START = "start"


class ClientUpdates:
    """The updates of one arm and seed.

    Args:
      folder: folder of the rounds, local or a bucket; created at the first write.
    """

    def __init__(self, folder: epath.PathLike):
        self._folder = epath.Path(folder)

    def begin_round(
        self, rounds_done: int, start: Any, like: Any
    ) -> Callable[[int, np.ndarray], None]:
        """Writes the factors that a round begins with; returns what writes a client's update.

        Args:
          rounds_done: number of the round, from 1: rounds done at its end.
          start: LoRA factors of the server before the round, on this process's devices; those of
            a residue behind them.
          like: the factors without the residue, for the shapes of updates.
        """
        self.write_start(rounds_done, start)

        def write(client: int, update: np.ndarray) -> None:
            self.write(rounds_done, client, update, like=like)

        return write

    def write_start(self, rounds_done: int, factors: Any) -> None:
        """Writes the factors that a round begins with.

        Args:
          rounds_done: number of the round, from 1: rounds done at its end.
          factors: LoRA factors of the server before the round.
        """
        self._write(rounds_done, START, jax.device_get(factors))

    def write(self, rounds_done: int, client: int, update: np.ndarray, like: Any) -> None:
        """Writes a client's update.

        Args:
          rounds_done: number of the round, from 1.
          client: id of the client.
          update: float32 `[params]`, as `simulation.run_round` hands it over.
          like: LoRA factors, for the names and shapes.
        """
        leaves, tree = jax.tree.flatten(like)
        ends = np.cumsum([x.size for x in leaves])[:-1]
        parts = [p.reshape(x.shape) for p, x in zip(np.split(update, ends), leaves, strict=True)]
        self._write(rounds_done, f"client_{client}", jax.tree.unflatten(tree, parts))

    def read(self, rounds_done: int, client: int) -> tuple[dict, dict]:
        """Reads `(factors that the round began with, update of a client)`.

        Args:
          rounds_done: number of the round, from 1.
          client: one of `clients(rounds_done)`.
        """
        folder = self._round(rounds_done)
        files = (folder / f"{name}.safetensors" for name in (START, f"client_{client}"))
        flat = (safetensors.numpy.load(file.read_bytes()) for file in files)
        start, update = (traverse_util.unflatten_dict(tensors, sep="/") for tensors in flat)
        return start, update

    def rounds(self) -> list[int]:
        """Returns the numbers of the rounds that have updates, in order."""
        return _numbers(self._folder, r"round_(\d+)")

    def clients(self, rounds_done: int) -> list[int]:
        """Returns the ids of the clients that have an update in a round, in order."""
        return _numbers(self._round(rounds_done), r"client_(\d+)\.safetensors")

    def hashes(self, rounds_done: int) -> dict[str, str]:
        """Returns the SHA-256 of a round's files: `start`, and each client's by its id.

        Args:
          rounds_done: number of the round, from 1; {} for one that has no updates.
        """
        folder, hashes = self._round(rounds_done), {}
        names = [f"client_{client}" for client in self.clients(rounds_done)]
        for name in [START, *names]:
            content = whole_files.read(folder / f"{name}.safetensors")
            if content is not None:
                hashes[name.removeprefix("client_")] = hashlib.sha256(content).hexdigest()
        return hashes

    def keep(self, kept: Collection[int]) -> None:
        """Deletes the rounds before the oldest one that is kept.

        Those of a checkpoint that is damaged are not touched, and nothing is without any that is
        whole: a repeated round writes the same files again.

        Args:
          kept: numbers of the rounds that have a checkpoint.
        """
        if multihost.is_primary() and kept:
            for rounds_done in self.rounds():
                if rounds_done < min(kept):
                    self._round(rounds_done).rmtree(missing_ok=True)

    def _round(self, rounds_done: int) -> epath.Path:
        return self._folder / f"round_{rounds_done}"

    def _write(self, rounds_done: int, name: str, tree: Any) -> None:
        if not multihost.is_primary():
            return
        flat = traverse_util.flatten_dict(tree, sep="/")
        content = safetensors.numpy.save({k: np.ascontiguousarray(v) for k, v in flat.items()})
        whole_files.write(self._round(rounds_done) / f"{name}.safetensors", content)


def _numbers(folder: epath.Path, pattern: str) -> list[int]:
    if not folder.is_dir():
        return []
    matches = (re.fullmatch(pattern, path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in matches if match)
