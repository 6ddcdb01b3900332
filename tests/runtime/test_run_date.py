"""The day of a run."""

import datetime
import json

from etils import epath

from fedsafe_jax.runtime.run_date import date_of


def test_the_day_is_that_of_the_first_start_or_the_one_asked_for(tmp_path):
    workdir = epath.Path(tmp_path)
    today = datetime.date.today()
    assert date_of(workdir, "") in (today.isoformat(), datetime.date.today().isoformat())
    (tmp_path / "config.json").write_text(json.dumps({"date": "2024-07-04"}))
    assert date_of(workdir, "") == "2024-07-04" and date_of(workdir, "2025-01-01") == "2025-01-01"
    for damaged in ("", "[]", '{"rounds": 1}', '{"date": ""}'):
        (tmp_path / "config.json").write_text(damaged)
        assert date_of(workdir, "") >= today.isoformat()


def test_a_replay_has_the_day_of_the_other_run_and_keeps_it(tmp_path):
    own, other = epath.Path(tmp_path / "own"), tmp_path / "other"
    own.mkdir(), other.mkdir()
    (other / "config.json").write_text(json.dumps({"date": "2024-07-04"}))
    assert date_of(own, "", str(other)) == "2024-07-04"
    (tmp_path / "own" / "config.json").write_text(json.dumps({"date": "2024-07-04"}))
    assert date_of(own, "", str(tmp_path / "gone")) == "2024-07-04"  # moved since
