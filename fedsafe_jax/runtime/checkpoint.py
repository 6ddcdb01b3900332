"""Orbax checkpoints of a federated run, written while the next round computes."""

import logging
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from fedsafe_jax.federated.simulation import FederatedState


class CheckpointError(RuntimeError):
    """A checkpoint was not written."""


class RoundCheckpoints:
    """Checkpoints of one arm and seed; Orbax's step is the number of rounds done.

    Args:
      folder: destination, created if missing.
      keep: number of newest checkpoints to keep; 0 for all.
    """

    def __init__(self, folder: epath.PathLike, keep: int = 2):
        self._folder = epath.Path(folder).resolve()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep or None, enable_async_checkpointing=True, create=True
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options)
        self._newest = self._manager.latest_step() or 0

    def restore(self, like: FederatedState) -> tuple[FederatedState, int]:
        """Reads the newest checkpoint that is whole.

        Orbax does not list a checkpoint whose writing was cut off. A damaged checkpoint is deleted,
        with a warning, and the one before it is read.

        Args:
          like: a state with the structure, shapes, dtypes and shardings of the saved ones.

        Returns:
          `(state, rounds done)`; `(like, 0)` without any checkpoint.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _stored(like))
                leaves = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
            except (OSError, ValueError, KeyError) as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                logging.warning(
                    "checkpoint %s cannot be read and is deleted: %s",
                    self._folder / str(step),
                    reason,
                )
                (self._folder / str(step)).rmtree(missing_ok=True)
                continue
            self._newest = step
            self._manager.reload()  # forgets the steps deleted above
            return _unstored(like, leaves), step
        self._newest = 0
        self._manager.reload()
        return like, 0

    def save(self, rounds_done: int, state: FederatedState) -> None:
        """Begins to write the state, in the background; a round saved before is left alone.

        Args:
          rounds_done: rounds that the state has seen.
          state: server and client state.

        Raises:
          CheckpointError: Orbax declined, which it does silently when the step is not new.
        """
        if rounds_done == self._newest:
            return
        if not self._manager.save(rounds_done, args=ocp.args.StandardSave(_stored(state))):
            raise CheckpointError(f"round {rounds_done} was not saved: a later checkpoint exists.")
        self._newest = rounds_done

    def rounds(self) -> list[int]:
        """Returns the rounds that are kept, in order; the newest may still be in writing."""
        return sorted(self._manager.all_steps())

    def close(self) -> None:
        """Waits until everything is written."""
        self._manager.wait_until_finished()
        self._manager.close()


def rounds_of(folder: epath.PathLike) -> list[int]:
    """Returns the rounds of which a folder has a whole checkpoint, in order; it writes nothing.

    Args:
      folder: folder of the checkpoints of one arm and seed, which need not exist.
    """
    folder = epath.Path(folder)
    return sorted(ocp.utils.checkpoint_steps(folder.resolve())) if folder.is_dir() else []


def read_factors(folder: epath.PathLike, rounds_done: int, like: Any) -> Any:
    """Reads the server's LoRA factors from a checkpoint, and nothing else of it.

    Args:
      folder: folder of the checkpoints of one arm and seed.
      rounds_done: one of `rounds_of(folder)`.
      like: factors, or their shapes, in the structure of the saved ones.

    Returns:
      Factors of numpy arrays, wherever the run had them.

    Raises:
      CheckpointError: the checkpoint is damaged, or holds factors of other shapes.
    """
    leaves, tree = jax.tree.flatten(like)
    # The factors come first in `FederatedState`, so their leaves have the first numbers.
    names = [f"{i:04d}" for i in range(len(leaves))]
    path = epath.Path(folder).resolve() / str(rounds_done)
    wanted = ocp.args.PyTreeRestore(
        item=dict.fromkeys(names, 0),
        restore_args=dict.fromkeys(names, ocp.RestoreArgs(restore_type=np.ndarray)),
        partial_restore=True,
    )
    try:
        saved = ocp.PyTreeCheckpointer().restore(path / "default", args=wanted)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"checkpoint {path} cannot be read: {reason}") from error
    shapes = [tuple(saved[name].shape) for name in names]
    if shapes != [tuple(x.shape) for x in leaves]:
        raise CheckpointError(
            f"checkpoint {path} holds factors of shapes {shapes[:2]} ..., config.json asks for "
            f"{[tuple(x.shape) for x in leaves][:2]} ...; the workdir's files do not go together."
        )
    return jax.tree.unflatten(tree, [saved[name] for name in names])


def _stored(state: FederatedState) -> dict:
    """Names leaves by number: Orbax stores neither empty tuples nor optax's named tuples."""
    return {f"{i:04d}": leaf for i, leaf in enumerate(jax.tree.leaves(state))}


def _unstored(like: FederatedState, leaves: dict) -> FederatedState:
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in sorted(leaves)])
