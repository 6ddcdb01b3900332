"""Labelled pairs for the tests of filters."""

from fedsafe_jax.data import sources
from fedsafe_jax.data.examples import Example


def pair(prompt, response, label="safe", category=""):
    return Example((("user", prompt),), response, label, category=category)


def packaged_pairs():
    return sources.load("chat:package/filter.jsonl", "")
