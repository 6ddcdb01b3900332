"""The harmful share that was asked is the share that clients hold, whatever the pools."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsafe_jax.data import partition, shares
from fedsafe_jax.data.examples import SAFE, UNSAFE, Example


def pools(num_safe, num_unsafe, users=5):
    safe = [
        Example((("user", f"s{i}"),), "r", SAFE, user=f"u{i % users}", category="xyz"[i % 3])
        for i in range(num_safe)
    ]
    return safe, [Example((("user", f"h{i}"),), "r", UNSAFE) for i in range(num_unsafe)]


def deal(num_safe, num_unsafe, sizes, of_client, kind="iid", seed=0, alpha=0.5):
    safe, unsafe = pools(num_safe, num_unsafe)
    rng = np.random.default_rng(seed)
    dealt = partition.partition(
        safe,
        unsafe,
        sizes=sizes,
        harmful_shares=of_client,
        kind=kind,
        rng=rng,
        alpha=alpha,
    )
    held = [sum(e.label == UNSAFE for e in examples) for examples in dealt]
    return dealt, [len(examples) for examples in dealt], held


def test_a_pool_that_is_too_small_shrinks_clients_and_not_the_share():
    # 54 safe pairs for 20 clients of 43 pairs: 83% of what clients held was harmful.
    _, sizes, unsafe = deal(54, 302, [43] * 20, of_client=[0.3] * 20)
    assert sum(sizes) - sum(unsafe) == 54 and abs(sum(unsafe) - 0.3 * sum(sizes)) <= 1
    assert max(sizes) - min(sizes) <= 1
    _, sizes, unsafe = deal(1000, 20, [43] * 20, of_client=[0.3] * 20)
    assert sum(unsafe) == 20 and abs(20 - 0.3 * sum(sizes)) <= 1


def test_shares_of_few_pairs_are_right_in_total():
    # 30% of three pairs is 0.9: rounded by client it would be one of three, 33%.
    _, sizes, unsafe = deal(300, 300, [3] * 20, of_client=[0.3] * 20)
    assert sum(sizes) == 60 and sum(unsafe) == 18 and set(unsafe) == {0, 1}
    _, sizes, unsafe = deal(300, 300, [1] * 20, of_client=[0.3] * 20)
    assert sum(unsafe) == 6  # by client all would be rounded to none
    assert shares.unsafe_counts([100] * 2, [0.29] * 2, num_safe=200, num_unsafe=200) == [29, 29]


def test_the_packaged_pools_give_the_demo_all_its_pairs():
    # 30% of 860 are 258; with 601 safe pairs 259 are within the tolerance, and no pair lacks.
    _, sizes, unsafe = deal(601, 302, [43] * 20, of_client=[0.3] * 20)
    assert sizes == [43] * 20 and sum(unsafe) == 259


def test_attackers_leave_their_safe_pairs_to_the_others():
    # Twelve of these went to the malicious client, who needs none, and the others lacked them.
    _, sizes, unsafe = deal(48, 16, [16] * 4, of_client=[1.0, 0.0, 0.0, 0.0])
    assert sizes == [16] * 4 and unsafe == [16, 0, 0, 0]


@pytest.mark.parametrize("kind", ["dirichlet", "user"])
def test_a_client_with_few_safe_pairs_keeps_its_share(kind):
    # Users of uneven sizes, and few of them: a client's safe pairs do not reach.
    for seed in range(20):
        _, sizes, unsafe = deal(
            200, 300, [60] * 5, of_client=[0.5] * 5, kind=kind, seed=seed, alpha=2.0
        )
        for n, u in zip(sizes, unsafe, strict=True):
            assert n <= 60 and abs(u - 0.5 * n) < 1


def test_what_cannot_be_dealt_is_one_line_with_numbers_that_would_do():
    with pytest.raises(partition.PartitionError, match="no unsafe pair.*unsafe_sources"):
        deal(50, 0, [10] * 4, of_client=[0.3] * 4)
    with pytest.raises(partition.PartitionError, match="no safe pair"):
        deal(0, 50, [10] * 4, of_client=[0.3] * 4)
    with pytest.raises(partition.PartitionError) as error:
        deal(9, 100, [10] * 20, of_client=[0.25] * 20)
    said = str(error.value)
    assert "more clients than examples" in said and "9 safe and 100 unsafe" in said
    assert "num_clients=1 would do" in said  # 9 safe and 3 unsafe pairs are a client of 10
    assert deal(0, 50, [10] * 4, of_client=[1.0] * 4)[2] == [10] * 4  # nobody asks for safe ones
    assert deal(50, 0, [10] * 4, of_client=[0.0] * 4)[2] == [0] * 4


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 200),
    st.integers(0, 200),
    st.lists(
        st.tuples(st.integers(1, 30), st.sampled_from([0, 0.05, 0.3, 0.5, 0.9, 1])), min_size=1
    ),
    st.sampled_from(["iid", "dirichlet", "user"]),
)
def test_any_deal_keeps_every_share_or_stops(num_safe, num_unsafe, clients, kind):
    sizes, asked_shares = zip(*clients[:5], strict=True)
    try:
        dealt, held, unsafe = deal(num_safe, num_unsafe, sizes, of_client=asked_shares, kind=kind)
    except partition.PartitionError:
        return
    everything = [e.prompt for examples in dealt for e in examples]
    assert len(everything) == len(set(everything))
    assert all(0 < n <= most for n, most in zip(held, sizes, strict=True))
    exact = [n * h for n, h in zip(held, asked_shares, strict=True)]
    assert all(abs(u - x) < 1 for u, x in zip(unsafe, exact, strict=True))
    assert abs(sum(unsafe) - sum(exact)) <= 1 + 1e-6
    if kind == "iid" and held != list(sizes):  # as much as there is: a pool is used up
        lacks = num_unsafe - sum(unsafe), num_safe - (sum(held) - sum(unsafe))
        assert min(lacks) <= len(sizes)
