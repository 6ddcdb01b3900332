"""Lines of progress: the share of all rounds, the numbers of a round, the time left."""

from fedsafe_jax.runtime.progress import PhaseTimer, Progress

ROW = {
    "arm": "fl", "seed": 0, "round": 1, "loss": 1.5, "tokens_per_second": 2000.0,
    "seconds": {"federated": 10.0, "cai": 20.0},
}  # fmt: skip


def test_rounds_of_an_earlier_process_count_as_done(capsys):
    progress = Progress(8)
    progress.resumed(3)
    progress.round_done(ROW)
    assert progress.rounds_done == 1
    # 4 of 8 rounds are done; the other 4 take 30 seconds each.
    line = capsys.readouterr().err.strip()
    assert line == "[ 50%] fl seed 0 round 2 | loss 1.500 | 2,000 tokens/s | 00:02:00 left"


def test_time_left_follows_the_median_round(capsys):
    progress = Progress(4)
    for seconds in (600.0, 10.0, 10.0):
        progress.round_done(ROW | {"seconds": {"federated": seconds}})
    assert capsys.readouterr().err.strip().endswith("00:00:10 left")


def test_phases_are_never_zero_seconds():
    timer = PhaseTimer()
    timer.mark("federated")
    timer.mark("cai")
    assert timer.seconds.keys() == {"federated", "cai"}
    assert all(seconds >= 1e-3 for seconds in timer.seconds.values())
