"""Orbax checkpoints of the server's state, one a round."""

import pathlib

import jax
import orbax.checkpoint as ocp

from fedsafe_jax.federated.algorithms import ServerState


class CheckpointError(RuntimeError):
    """A checkpoint was not written."""


class RoundCheckpoints:
    """Checkpoints of one arm and seed; the step is the number of rounds done.

    Args:
      folder: created if missing.
      keep: how many of the newest to keep.
    """

    def __init__(self, folder: pathlib.Path, keep: int = 2):
        # Synchronous: a round's adapter is small, and a killed run then never meets a half-written
        # one.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=False, create=True
        )
        self._manager = ocp.CheckpointManager(pathlib.Path(folder).resolve(), options=options)

    def latest(self) -> int:
        """Rounds done according to the newest checkpoint; 0 when there is none."""
        return self._manager.latest_step() or 0

    def restore(self, like: ServerState) -> ServerState:
        """The newest state, with the structure, shapes and dtypes of `like`."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _stored(like))
        args = ocp.args.StandardRestore(abstract)
        restored = self._manager.restore(self._manager.latest_step(), args=args)
        return like._replace(**restored)

    def save(self, rounds_done: int, state: ServerState) -> None:
        """Writes the state.

        Raises:
          CheckpointError: Orbax declined (it does so silently when the step is not new).
        """
        args = ocp.args.StandardSave(_stored(state))
        if not self._manager.save(rounds_done, args=args):
            raise CheckpointError(f"round {rounds_done} was not saved: a later checkpoint exists.")

    def close(self) -> None:
        self._manager.close()


def _stored(state: ServerState) -> dict:
    # Algorithms without control variates leave empty tuples, which Orbax cannot store.
    return {name: value for name, value in state._asdict().items() if jax.tree.leaves(value)}
