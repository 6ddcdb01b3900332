"""No two random streams coincide, and the package draws from them alone."""

import ast
import itertools
import json
import pathlib

import jax
import numpy as np
import pytest

from fedsafe_jax.demo import demo_set
from fedsafe_jax.federated.participation import malicious_clients, sample_ids
from fedsafe_jax.random_streams import Purpose, generator, key, seed

ROOT = pathlib.Path(__file__).parents[1] / "fedsafe_jax"
# Who may draw by themselves, and what. A fold or split of a key stays within the key's stream.
EXCEPTIONS = {
    ("random_streams.py", "np.random.default_rng"),
    # OpenFedLLM's own draws, which are from the round number alone.
    ("federated/participation.py", "random.Random"),
    ("data/batches.py", "random.Random"),
    # A hash of bits that are drawn from the stream `ADAPTER_DROPOUT`.
    ("models/dropout.py", "jax.random.key"),
    # It drew the packaged files, which stay as they are: see the test below.
    ("demo/demo_set.py", "np.random.default_rng"),
}
MAKERS = {"default_rng", "key", "PRNGKey", "Random", "RandomState", "SeedSequence", "wrap_key_data"}


def test_no_two_streams_coincide():
    """First words over purposes x seeds x rounds x clients, of numpy and of jax."""
    places = [(), *((t,) for t in range(9)), *itertools.product(range(9), range(4))]
    places += [(t, c, k) for t in range(2) for c in range(2) for k in range(2)]
    drawn, keys, streams = set(), set(), 0
    for purpose, s, where in itertools.product(Purpose, (0, 1, 2, 7, 2**32), places):
        sequence = generator(purpose, s, *where).bit_generator.seed_seq
        assert sequence.spawn_key == (purpose, *where)
        drawn.add(generator(purpose, s, *where).bytes(16))
        # The words that `key` wraps, without 6,000 calls to jax.
        keys.add(sequence.generate_state(2, np.uint32).tobytes())
        streams += 1
    assert len(drawn) == len(keys) == streams
    for purpose in Purpose:
        words = generator(purpose, 3, 5).bit_generator.seed_seq.generate_state(2, np.uint32)
        np.testing.assert_array_equal(jax.random.key_data(key(purpose, 3, 5)), words)
        assert seed(purpose, 3, 5) != seed(purpose, 3, 6)


def test_numbers_of_purposes_stay():
    assert [p.value for p in Purpose] == list(range(1, len(Purpose) + 1))
    # What a seed draws today; another number here changes what every seed draws.
    assert int(generator(Purpose.COHORT, 0, 8).integers(2**32)) == 2016130605
    assert jax.random.key_data(key(Purpose.ADAPTER, 0)).tolist() == [2471122328, 157388373]


@pytest.mark.parametrize("s, where", [(-1, ()), (2**128, ()), (0, (2**32,)), (0, (-1,))])
def test_numbers_that_would_run_into_others_are_refused(s, where):
    with pytest.raises(ValueError, match="expected"):
        generator(Purpose.COHORT, s, *where)


def test_no_cohort_is_the_malicious_set():
    """Overlaps of cohorts and malicious clients have the mean of independent draws, 1.25 of 5."""
    overlaps = np.array(
        [
            [
                len(set(sample_ids(s, t, [1] * 20, count=5)[0].tolist()) & set(bad))
                for t in range(12)
            ]
            for s in range(400)
            for bad in [malicious_clients(s, 20, 0.25)]
        ]
    )  # fmt: skip
    # A hypergeometric number of variance 0.74, 400 seeds: five standard errors are 0.22.
    assert np.all(np.abs(overlaps.mean(0) - 1.25) < 0.22), overlaps.mean(0)
    assert np.all((overlaps == 5).mean(0) < 0.02)  # by chance 1 in 15,504


def test_the_package_draws_from_its_streams_alone():
    found = set()
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner, name = ast.unparse(node.func.value), node.func.attr
                draws = owner.split(".")[-1] == "random" and name in MAKERS
                if draws or name == "default_rng":
                    found.add((path.relative_to(ROOT).as_posix(), f"{owner}.{name}"))
    found -= {("random_streams.py", f"{owner}.random.{name}") for owner, name in (
        ("np", "SeedSequence"), ("jax", "wrap_key_data")
    )}  # fmt: skip
    assert found == EXCEPTIONS


def test_the_demo_set_is_drawn_as_it_was():
    for name, rows in demo_set.build().items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        assert text == (ROOT / "assets" / "demo" / name).read_text(encoding="utf-8"), name
