"""Orbax checkpoints of a federated run, written while the next round computes."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from fedsafe_jax.federated.simulation import FederatedState
from fedsafe_jax.runtime import multihost
from fedsafe_jax.whole_files import StorageError, set_aside, storage


class CheckpointError(StorageError):
    """A checkpoint was not written, or cannot be reached."""


class RoundCheckpoints:
    """Checkpoints of one arm and seed; Orbax's step is the number of rounds done.

    Args:
      folder: destination, created if missing.
      keep: number of newest checkpoints to keep; 0 for all.

    Raises:
      StorageError: the folder cannot be created.
    """

    def __init__(self, folder: epath.PathLike, keep: int = 2):
        self._folder = epath.Path(folder).resolve()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep or None, enable_async_checkpointing=True, create=True
        )
        with storage(self._folder):
            self._manager = ocp.CheckpointManager(self._folder, options=options)
        self._newest = self._manager.latest_step() or 0

    def restore(self, like: FederatedState) -> tuple[FederatedState, int]:
        """Reads the newest checkpoint that is whole.

        Orbax does not list a checkpoint whose writing was cut off. A damaged checkpoint N becomes
        `N.damaged`, with a warning, and the one before it is read. The primary process reads, and
        sends the others what it found: so all go on from the same round, whatever each of them
        could see.

        Args:
          like: a state with the structure, shapes, dtypes and shardings of the saved ones.

        Returns:
          `(state, rounds done)`; `(like, 0)` without any checkpoint. In runs of several processes
          the leaves are numpy arrays.

        Raises:
          CheckpointError: a checkpoint cannot be reached; nothing is changed.
        """
        step, leaves, failure = 0, None, None
        if multihost.is_primary():
            try:
                step, leaves = self._newest_whole(like)
            except CheckpointError as error:
                step, failure = -1, error  # the others must not wait for a process that has ended
        step = int(multihost.broadcast(np.int64(step)))
        if step < 0:
            raise failure or CheckpointError("the first process could not read the checkpoints.")
        self._newest = step
        self._manager.reload()  # forgets the steps renamed above
        if not step:
            return like, 0
        if leaves is None:
            leaves = jax.tree.map(_on_host, _stored(like))
        return _unstored(like, multihost.broadcast(leaves)), step

    def _newest_whole(self, like: FederatedState) -> tuple[int, dict | None]:
        """Returns the newest step that can be read with its leaves, `(0, None)` without any."""
        for step in sorted(self._manager.all_steps(), reverse=True):
            path = self._folder / str(step)
            try:
                return step, self._read(step, like)
            except (OSError, ValueError, KeyError) as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                if _is_passing(error):
                    raise CheckpointError(
                        f"checkpoint {path} cannot be reached, nothing is changed: {reason}. Start "
                        "the same command again when the file system answers."
                    ) from error
            try:
                set_aside(path, f"the checkpoint cannot be read: {reason}")
            except StorageError as error:
                raise CheckpointError(str(error)) from error
        return 0, None

    def _read(self, step: int, like: FederatedState) -> dict:
        """Reads the leaves of a checkpoint; raises what Orbax and the file system raise."""
        if jax.process_count() == 1:
            abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _stored(like))
            return self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        # Without the others, which Orbax would wait for.
        alone = ocp.options.MultiprocessingOptions(
            primary_host=0, active_processes={0}, barrier_sync_key_prefix="restore"
        )
        handler = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
            return reader.restore(
                self._folder / str(step) / "default",
                args=ocp.args.StandardRestore(jax.tree.map(_on_host, _stored(like))),
            )

    def save(self, rounds_done: int, state: FederatedState) -> None:
        """Begins to write the state, in the background; a round saved before is left alone.

        Args:
          rounds_done: rounds that the state has seen.
          state: server and client state.

        Raises:
          CheckpointError: the storage does not take it, or not the one before, which was written
            meanwhile; or Orbax declined, which it does silently when the step is not new.
        """
        if rounds_done == self._newest:
            return
        with _writing(self._folder):
            saved = self._manager.save(rounds_done, args=ocp.args.StandardSave(_stored(state)))
        if not saved:
            raise CheckpointError(f"round {rounds_done} was not saved: a later checkpoint exists.")
        self._newest = rounds_done

    def rounds(self) -> list[int]:
        """Returns the rounds that are kept, in order; the newest may still be in writing."""
        return sorted(self._manager.all_steps())

    def close(self) -> None:
        """Waits until everything is written.

        Raises:
          CheckpointError: the storage does not take it.
        """
        with _writing(self._folder):
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
    """Reads the first leaves of a checkpoint: the server's LoRA factors, or all that it keeps.

    Args:
      folder: folder of the checkpoints of one arm and seed.
      rounds_done: one of `rounds_of(folder)`.
      like: factors, a `ServerState` or a `FederatedState`, or their shapes, in the structure of
        what was saved.

    Returns:
      The same of numpy arrays, wherever the run had them.

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


# What tensorstore says in a ValueError of files that it could not reach.
_PASSING = re.compile(
    "UNAVAILABLE|DEADLINE_EXCEEDED|PERMISSION_DENIED|UNAUTHENTICATED|RESOURCE_EXHAUSTED|ABORTED"
)


def _is_passing(error: Exception) -> bool:
    """Returns whether an error is of the way to a file, and says nothing of what the file holds."""
    if isinstance(error, OSError):
        return not isinstance(error, FileNotFoundError)  # a part of the checkpoint is gone
    return bool(_PASSING.search(str(error)))


@contextlib.contextmanager
def _writing(folder: epath.Path) -> Iterator[None]:
    """Makes what Orbax and tensorstore raise of a full or unreachable storage one line."""
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) and not _is_passing(error):
            raise
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{folder}: a checkpoint was not written ({reason}). Start the same command again when "
            "there is room."
        ) from error


def _on_host(x: jax.Array | np.ndarray) -> np.ndarray:
    return np.empty(x.shape, x.dtype)


def _stored(state: FederatedState) -> dict:
    """Names leaves by number: Orbax stores neither empty tuples nor optax's named tuples."""
    return {f"{i:04d}": leaf for i, leaf in enumerate(jax.tree.leaves(state))}


def _unstored(like: FederatedState, leaves: dict) -> FederatedState:
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in sorted(leaves)])
