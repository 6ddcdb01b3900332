"""Configs with anything in any field: accepted with the values given, or refused by name."""

import ml_collections
from fuzzing import fuzzed, refused
from hypothesis import given
from hypothesis import strategies as st

from fedsafe_jax.config import ConfigError, default_config
from fedsafe_jax.pipeline.arms import planned_arms
from fedsafe_jax.validation import choices, validate


def fields(config, prefix=""):
    for name, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            yield from fields(value, f"{prefix}{name}.")
        else:
            yield prefix + name


NAMES = sorted(fields(default_config()))
WORDS = sorted({word for words in choices().values() for word in words})
NUMBERS = st.one_of(
    st.integers(-2, 50),
    st.floats(-2, 2, width=16),
    st.sampled_from([0, 1, -1, 10**9, 1e-9, float("nan"), float("inf")]),
)


def value_of(kind):
    """Values of the type of a field, which ml_collections enforces, sensible or not."""
    if isinstance(kind, bool):
        return st.booleans()
    if isinstance(kind, int):
        return st.one_of(st.integers(-2, 50), st.just(10**9))
    if isinstance(kind, float):
        return NUMBERS.map(float)
    if isinstance(kind, str):
        return st.one_of(st.sampled_from(WORDS), st.text(max_size=8), st.just("chat:none.jsonl"))
    return st.lists(
        st.one_of(st.sampled_from(WORDS), st.integers(-1, 40), st.text(max_size=6)), max_size=3
    ).map(tuple)


def holder(config, name):
    group, _, field = name.rpartition(".")
    return (config[group] if group else config), field


@st.composite
def changes(draw):
    config = default_config()
    names = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True))
    drawn = {}
    for name in names:
        inside, field = holder(config, name)
        drawn[name] = draw(value_of(inside[field]))
    return drawn


@fuzzed
@given(changes())
def test_configs_are_accepted_or_refused_by_name(drawn):
    config = default_config()
    for name, value in drawn.items():
        inside, field = holder(config, name)
        inside[field] = value
    before = config.to_dict()
    try:
        validate(config)
    except ConfigError as error:
        refused(error)
        # The line names a field that was changed: by its name, or with its group before it.
        assert any(name.split(".")[-1] in str(error) for name in drawn), error
        return
    after = config.to_dict()
    assert repr(after) == repr(before)  # NaN is not equal to itself
    assert len(planned_arms(config)) >= 1 and config.seeds
    for name in drawn:
        inside, field = holder(config, name)
        value = inside[field]
        assert not (isinstance(value, float) and value != value), f"{name} is NaN"
        if name in choices():
            words = value if isinstance(value, tuple) else (value,)
            assert set(words) <= set(choices()[name]) | {""}, name
