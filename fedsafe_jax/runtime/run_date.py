"""The day of a run, which chat templates write: that of its first start, also when it goes on."""

import datetime
import json

import numpy as np
from etils import epath

from fedsafe_jax.runtime import multihost


def date_of(workdir: epath.Path, asked: str, replayed: str = "") -> str:
    """Returns a run's day, such as "2026-11-26", the same in all processes.

    Args:
      workdir: folder of the run; where it holds one, its day is kept.
      asked: the day that the config asks for; "" for that of the first start.
      replayed: folder of the run that this one replays, whose day it takes; "" for none.
    """
    if asked:
        return asked
    # Its own first: a replay goes on where the other folder is gone since.
    known = _recorded(workdir) or (_recorded(epath.Path(replayed)) if replayed else None)
    first = np.int32((known or datetime.date.today()).toordinal())
    return datetime.date.fromordinal(int(multihost.broadcast(first))).isoformat()


def _recorded(workdir: epath.Path) -> datetime.date | None:
    """The day in the workdir's `config.json`; None where there is none, or none to be read."""
    path = workdir / "config.json"
    try:
        return datetime.date.fromisoformat(json.loads(path.read_text(encoding="utf-8"))["date"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # whether the file is sound is checked where the workdir is claimed
