"""What a run's metrics say of those who took part, and who did not."""

import pytest
from commands import NO_ANSWERS, rows, run

from fedsafe_jax.runtime import arm_secret


def test_a_run_reports_who_took_part(tmp_path):
    pytest.importorskip("dp_accounting")
    # Else noise and cohorts are drawn anew each time, and now and then all cohorts are equally big.
    arm_secret.of_arm(tmp_path / "checkpoints" / "fl" / "seed0", lambda: 1)
    run(
        tmp_path,
        "arms=('fl',)",
        NO_ANSWERS,
        "num_clients=8",
        "clients_per_round=6",
        "algorithms=('fedadam',)",
        "federated.dropout=0.3",
        "federated.stragglers=0.5",
        "federated.clip_norm=0.05",
        "federated.noise_multiplier=0.5",
        "federated.sampling=poisson",
        "attack.clients=0.25",
        "attack.boost=10.0",
        "size_sigma=0.5",
    )
    found = rows(tmp_path)
    assert len({len(r["clients"]) for r in found}) > 1  # Poisson cohorts
    for r in found:
        count = len(r["clients"])
        assert len(r["delta_norms"]) == len(r["cosines"]) == len(r["steps"]) == count
        assert all(-1 <= c <= 1 for c in r["cosines"]) and r["bytes_up"] == r["bytes_down"]
    assert any(r["dropped_out"] for r in found) and any(r["malicious"] for r in found)
    epsilons = [r["epsilon"] for r in found]
    assert 0 < epsilons[0] < epsilons[1] < epsilons[2]
    bad = [
        n
        for r in found
        for c, n in zip(r["clients"], r["delta_norms"], strict=True)
        if c in r["malicious"]
    ]
    good = [
        n
        for r in found
        for c, n in zip(r["clients"], r["delta_norms"], strict=True)
        if c not in r["malicious"]
    ]
    assert max(good) < max(bad)


@pytest.mark.slow
def test_a_client_that_the_filter_empties_is_counted_and_the_run_goes_on(tmp_path):
    run(
        tmp_path,
        "arms=('fl+filter',)",
        NO_ANSWERS,
        "num_clients=3",
        "clients_per_round=3",
        "filter.epochs=5",
        "attack.clients=0.34",
        "examples_per_client=6",
        "harmful_share=0.0",
    )
    assert all(len(r["no_data"]) == 1 and len(r["clients"]) == 2 for r in rows(tmp_path))


def test_a_client_whose_pairs_are_all_masked_weighs_nothing_and_is_named(tmp_path):
    done = run(
        tmp_path,
        "arms=('fl+filter',)",
        NO_ANSWERS,
        "num_clients=3",
        "clients_per_round=3",
        "filter.kind=simulated",
        "filter.simulated_recall=1.0",
        "filter.simulated_precision=1.0",
        "filter.action=mask",
        "attack.clients=0.34",
        "examples_per_client=6",
        "harmful_share=0.0",
    )
    assert all(len(r["no_data"]) == 1 and len(r["clients"]) == 2 for r in rows(tmp_path))
    (masked,) = rows(tmp_path)[0]["no_data"]
    line = f"filter: clients {masked} weigh 0, all of their pairs are masked"
    assert line in done.stdout + done.stderr
