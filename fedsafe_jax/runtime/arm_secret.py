"""The secret of an arm's differential privacy: from it come noise and cohorts, never from a seed.

Epsilon holds against those who know everything but the secret. A seed is in `config.json`, mostly
0, and the same for all arms: who knows it can take the noise away. So the secret is drawn from the
operating system's entropy, for each arm, algorithm and seed anew, and kept beside the arm's
checkpoints, so that a resumed run ends in the same bits. It is no field and no record.
"""

import secrets
from collections.abc import Callable

import numpy as np
from etils import epath

from fedsafe_jax import whole_files
from fedsafe_jax.runtime import multihost
from fedsafe_jax.runtime.checkpoint import rounds_of
from fedsafe_jax.whole_files import WorkdirError

NAME = "secret"  # of the file beside the checkpoints
WORDS = 4  # 128 bits, the longest seed of a random stream


def draw() -> int:
    """Draws 128 bits from the operating system's entropy."""
    return secrets.randbits(32 * WORDS)


def of_arm(folder: epath.PathLike, draw_secret: Callable[[], int] = draw) -> int:
    """Returns the secret of an arm and seed, the same in all processes and after each resume.

    The first process reads or draws it, and sends it to the others.

    Args:
      folder: folder of the arm's checkpoints, created if missing.
      draw_secret: draws the secret, 0 to 2**128 - 1; tests alone give another one.

    Raises:
      WorkdirError: the file is damaged, or there are checkpoints without it: their noise was drawn
        from the run's seed, by an earlier version.
      StorageError: the file cannot be reached.
    """
    secret = multihost.first(lambda: _read_or_draw(epath.Path(folder), draw_secret)) or 0
    words = np.array([secret >> 32 * i & 0xFFFFFFFF for i in range(WORDS)], np.uint32)
    words = multihost.broadcast(words).tolist()
    return sum(word << 32 * i for i, word in enumerate(words))


def _read_or_draw(folder: epath.Path, draw_secret: Callable[[], int]) -> int:
    path = folder / NAME
    content = whole_files.read(path)
    if content is None:
        if rounds := rounds_of(folder):
            raise WorkdirError(
                f"{folder} has checkpoints of {rounds[-1]} rounds, but not their secret: noise "
                "that was drawn from the seed hides nothing, and their epsilon does not hold. "
                "Choose another --workdir."
            )
        content = f"{draw_secret():032x}\n".encode()
        whole_files.write(path, content, private=True)
    try:
        return int(content, 16)
    except ValueError:
        raise WorkdirError(
            f"{path} is damaged, and the noise of this arm cannot be drawn again. Choose another "
            "--workdir."
        ) from None
