"""Orbax checkpoints of a federated run, written while the next round computes."""

import logging

import jax
import orbax.checkpoint as ocp
from etils import epath

from fedsafe_jax.federated.simulation import FederatedState


class CheckpointError(RuntimeError):
    """A checkpoint was not written."""


class RoundCheckpoints:
    """Checkpoints of one arm and seed; Orbax's step is the number of rounds done.

    Args:
      folder: destination, created if missing.
      keep: number of newest checkpoints to keep.
    """

    def __init__(self, folder: epath.PathLike, keep: int = 2):
        self._folder = epath.Path(folder).resolve()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=True, create=True
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

    def close(self) -> None:
        """Waits until everything is written."""
        self._manager.wait_until_finished()
        self._manager.close()


def _stored(state: FederatedState) -> dict:
    """Names leaves by number: Orbax stores neither empty tuples nor optax's named tuples."""
    return {f"{i:04d}": leaf for i, leaf in enumerate(jax.tree.leaves(state))}


def _unstored(like: FederatedState, leaves: dict) -> FederatedState:
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in sorted(leaves)])
