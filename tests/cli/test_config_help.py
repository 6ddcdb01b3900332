"""Fields with default and meaning, against the configs themselves."""

import ast

import pytest

from fedsafe_jax.cli import config_file, config_help, pretrain
from fedsafe_jax.config import default_config, filter_config
from fedsafe_jax.federated.aggregation import AGGREGATORS

SOURCE = """
def get_config(arg=""):
    c = ml_collections.ConfigDict()
    c.rate = 1e-3  # a step
    # Where it is read from,
    # and by whom.
    c.sources = (
        "a",
        "b#c",  # one of them
    )
    c.inner = ml_collections.ConfigDict()
    c.inner.flag = ""  # ""; or | a pipe
    if arg:
        c.rate = 2.0  # not the default
    return c
"""


def test_comments_above_and_behind_are_the_meaning(tmp_path):
    (tmp_path / "c.py").write_text("import ml_collections\n" + SOURCE)
    fields = config_help.fields_of(config_file.module_of(str(tmp_path / "c.py")).get_config)
    assert [tuple(field) for field in fields] == [
        ("rate", "1e-3", "a step"),
        ("sources", '("a", "b#c")', "Where it is read from, and by whom."),
        ("inner.flag", '""', '""; or | a pipe'),
    ]
    assert [field.group for field in fields] == ["", "", "inner"]


@pytest.mark.parametrize(
    ("fields", "defaults"),
    [
        (config_help.run_fields, default_config),
        (config_help.filter_fields, filter_config),
        (pretrain.fields, pretrain.defaults),
    ],
)
def test_every_field_is_listed_with_its_default(fields, defaults):
    config = defaults()
    listed = {field.name: field for field in fields()}
    assert sorted(listed) == sorted(config_file.flat_names(config))
    for name, field in listed.items():
        value = config
        for part in name.split("."):
            value = value[part]
        assert ast.literal_eval(field.default) == value, name


def test_the_documentations_page_has_a_table_a_group():
    page = config_help.markdown()
    assert page.startswith("# Configuration\n") and page.count("| field | default | |") == 7
    for group in ("chat_template_kwargs", "attack", "federated", "filter", "cai", "eval"):
        assert f"\n## `{group}`\n" in page
    assert "| `cai.batch_size` | `8` |" in page


@pytest.mark.parametrize(
    "fields", [config_help.run_fields, config_help.filter_fields, pretrain.fields]
)
def test_every_field_has_a_meaning_that_stands_alone(fields):
    for field in fields():
        first = field.meaning.partition(" ")[0].lower()
        assert field.meaning, field.name
        assert first not in ("of", "to", "as", "from", "or", "a", "at", "its", "such"), field


def test_the_names_a_field_may_have_are_those_of_the_registry(monkeypatch):
    monkeypatch.setitem(AGGREGATORS, "mine", AGGREGATORS["mean"])
    meanings = {field.name: field.meaning for field in config_help.run_fields()}
    assert meanings["federated.aggregator"].endswith(f"; one of {', '.join(AGGREGATORS)}")
    assert "; some of sft, dpo, ipo, kto, derta" in meanings["cai.losses"]
    assert meanings["quantization"].endswith('; one of "", int8, nf4')
