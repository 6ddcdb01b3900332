"""The secret of differential privacy: new in each arm, kept for a resume, never in a record."""

import pytest

from fedsafe_jax.runtime import arm_secret
from fedsafe_jax.runtime.checkpoint import RoundCheckpoints
from fedsafe_jax.whole_files import WorkdirError


def test_each_arm_draws_its_own_and_keeps_it(tmp_path):
    first = arm_secret.of_arm(tmp_path / "fl")
    assert arm_secret.of_arm(tmp_path / "fl") == first  # a resume
    assert arm_secret.of_arm(tmp_path / "fl_filter") != first
    assert 0 < first < 2**128 and first.bit_length() > 90  # 128 bits: less by chance of 2**-38
    assert arm_secret.of_arm(tmp_path / "test", lambda: 7) == 7
    (file,) = (tmp_path / "fl").iterdir()
    assert file.name == "secret" and file.stat().st_mode & 0o777 == 0o600


def test_orbax_lets_the_file_be(tmp_path):
    secret = arm_secret.of_arm(tmp_path / "fl")
    checkpoints = RoundCheckpoints(tmp_path / "fl")
    assert checkpoints.rounds() == []
    checkpoints.close()
    assert arm_secret.of_arm(tmp_path / "fl") == secret


def test_checkpoints_whose_noise_was_of_the_seed_are_refused(tmp_path):
    (tmp_path / "fl" / "3").mkdir(parents=True)
    (tmp_path / "fl" / "3" / "_CHECKPOINT_METADATA").write_text("{}")
    with pytest.raises(WorkdirError, match="3 rounds, but not their secret"):
        arm_secret.of_arm(tmp_path / "fl")
    assert not (tmp_path / "fl" / "secret").exists()


def test_a_damaged_secret_is_one_line(tmp_path):
    (tmp_path / "secret").write_text("no number")
    with pytest.raises(WorkdirError, match="is damaged") as caught:
        arm_secret.of_arm(tmp_path)
    assert "\n" not in str(caught.value)
