"""Every number of a config has a range; what is outside is refused by name."""

import ml_collections
import pytest

from fedsafe_jax.config import ConfigError, default_config, filter_config
from fedsafe_jax.validation import one_line, validate, validate_filter
from fedsafe_jax.validation.ranges import NUMBER_LISTS, RANGES, Range


def numbers(config, prefix=""):
    """Yields the names of all numeric fields."""
    for name, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            yield from numbers(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + name


def test_every_numeric_field_has_a_range_that_holds_its_default():
    config = default_config()
    names = set(numbers(config))
    own = set(numbers(filter_config())) - {n.removeprefix("filter.") for n in names}
    assert names | own <= set(RANGES)
    assert set(RANGES) - {"max_per_source", "seed"} == names
    validate(config)
    validate_filter(filter_config())


@pytest.mark.parametrize("name", sorted(numbers(default_config())))
def test_numbers_outside_of_their_range_are_refused_by_name(name):
    allowed = RANGES[name]
    for wrong in (float("nan"), float("inf"), allowed.low - 1):
        config = default_config()
        group, _, field = name.rpartition(".")
        inside = config[group] if group else config
        if isinstance(inside[field], int):
            wrong = int(allowed.low - 1) if allowed.low > -1e9 else None
        if wrong is None or allowed.holds(wrong):
            continue
        inside[field] = wrong
        with pytest.raises(ConfigError, match=rf"^{name}="):
            validate(config)


@pytest.mark.parametrize("name", NUMBER_LISTS)
def test_lists_of_numbers_hold_numbers(name):
    for wrong in ("a", -1, float("nan"), True):
        config = default_config()
        group, _, field = name.rpartition(".")
        (config[group] if group else config)[field] = (wrong,)
        with pytest.raises(ConfigError, match=name):
            validate(config)


@pytest.mark.parametrize(
    ("allowed", "words"),
    [
        (Range(), "a finite number"),
        (Range(1), "at least 1"),
        (Range(0, above=True), "more than 0"),
        (Range(0, 1), "a share between 0 and 1"),
        (Range(0, 1, above=True), "more than 0, at most 1"),
        (Range(0, 1, above=True, below=True), "more than 0, less than 1"),
    ],
)
def test_ranges_in_words(allowed, words):
    assert str(allowed) == words


def test_messages_are_one_printable_line():
    assert one_line(ValueError("a\x1b[31m\nb")) == "a\\x1b[31m b"


def test_holding_alone_or_on_nothing_is_refused():
    config = default_config()
    config.cai.losses, config.cai.weights = ("sft", "kl"), (1.0, 4.0)
    validate(config)
    config.cai.replay_examples = 0
    with pytest.raises(ConfigError, match="'kl' holds the model on replayed pairs, and cai.replay"):
        validate(config)
    config.cai.losses, config.cai.weights, config.cai.replay_examples = ("kl",), (1.0,), 8
    with pytest.raises(ConfigError, match="'kl' keeps the model what it is; add a loss"):
        validate(config)


@pytest.mark.parametrize("word", ["", "  "])
def test_a_refusal_word_of_blanks_is_refused(word):
    """It has no token that harmful answers could turn to."""
    config = default_config()
    config.cai.refusal_word = word
    with pytest.raises(ConfigError, match=f"cai.refusal_word='{word}': expected a word"):
        validate(config)
