"""What clients sent is kept beside every checkpoint, also beside a damaged one."""

import numpy as np
from etils import epath

from fedsafe_jax.runtime.client_updates import ClientUpdates


def test_only_rounds_before_the_oldest_kept_are_deleted(tmp_path):
    kept = ClientUpdates(epath.Path(tmp_path))
    like = {"a": np.zeros((2, 2)), "b": np.zeros(3)}
    for done in (1, 2, 3, 4):
        kept.write(done, 0, np.arange(7.0), like=like)
    kept.keep([])  # every checkpoint is damaged, and kept under another name
    assert kept.rounds() == [1, 2, 3, 4]
    kept.keep([2, 4])  # the one of round 3 is damaged
    assert kept.rounds() == [2, 3, 4]
