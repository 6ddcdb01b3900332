"""What a server's config may ask of a site, whose operator decides."""

import json
import shutil

import pytest
from commands import ROOT

pytest.importorskip("flwr")

from test_flower import node_config  # noqa: E402

from fedsafe_jax.config import ConfigError, default_config  # noqa: E402
from fedsafe_jax.filters.protocol import FilterError  # noqa: E402
from fedsafe_jax.flower import site, site_policy, wire  # noqa: E402
from fedsafe_jax.flower.site_policy import PolicyError, SettingsError, SiteSettings  # noqa: E402

SETTINGS = SiteSettings(
    client=0, sources=("chat:mine.jsonl",), data_dir="/mine", workdir="/mine/work"
)
PLACES = (
    "/etc/passwd", "../secret.json", "~/secret.json", "owner/model", "https://elsewhere.example/x",
    "file:///etc/passwd", "chat:/etc/passwd", "chat:../secret.jsonl", "chat:owner/data",
    "package/../../../secret.json", "chat:package/../../secret.json", "package:secret", "hub",
    "chat:package", "/package/secret.json", "chat:x:package/secret.json", "os:system",
)  # fmt: skip


def sent(**fields):
    """The config that a site reads from a hostile server, which need not leave out anything."""
    config = default_config()
    config.arms = ("base", "fl+filter")
    for name, value in fields.items():
        wire.set_field(config, name.replace("__", "."), value)
    return config


def with_text(field, text):
    config = default_config()
    if field == "eval.tasks":
        text = f"hhh={text}"
    is_text = isinstance(config.get(field, "") if "." not in field else "", str)
    for part in field.split(".")[:-1]:
        is_text = isinstance(config[part][field.split(".")[-1]], str)
    wire.set_field(config, field, text if is_text else (text,))
    return config


def test_every_text_of_a_config_is_a_word_or_the_operators_or_refused(monkeypatch):
    def opened(*arguments, **options):
        raise AssertionError("a refusal looked at a file")

    def refusal(config):
        """Applies the policy with no file in reach; returns the error, None for none."""
        with monkeypatch.context() as patch:
            for name in ("open", "is_file", "is_dir", "exists", "stat", "read_text"):
                patch.setattr(f"pathlib.Path.{name}", opened)
            for name in ("isfile", "isdir", "exists"):
                patch.setattr(f"os.path.{name}", opened)
            try:
                site_policy.apply(config, SETTINGS)
            except (PolicyError, AssertionError) as error:
                return error
        return None

    fields = site_policy.text_fields(default_config())
    # Whoever adds a field that holds text decides here what it may be at a site.
    assert set(site_policy.WORDS) == {
        "date", "optimizer", "lora_targets", "attack.trigger", "filter.unsafe_labels",
        "cai.refusal_word",
    }  # fmt: skip
    checked = 0
    for field in sorted(fields - set(site_policy.WORDS) - {"federated.client_ranks"}):
        for place in PLACES:
            config = with_text(field, place)
            error = refusal(config)
            if field in wire.OPERATORS_OWN:
                assert error is None and f'"{place}"' not in json.dumps(config.to_dict())
            else:
                start = f"{field}: the server's config names"
                assert isinstance(error, PolicyError) and str(error).startswith(start), place
            checked += 1
    assert checked == len(PLACES) * 34


def test_a_field_that_nobody_has_thought_of_is_refused():
    config = default_config()
    config.new_folder, config.cai.new_sources = "", ("chat:package/filter.jsonl", "chat:x.jsonl")
    with pytest.raises(PolicyError, match="cai.new_sources: the server's config names 'chat:x"):
        site_policy.apply(config, SETTINGS)


def test_what_is_packaged_is_allowed_and_what_the_operator_lists():
    assert site_policy.apply(default_config(), SETTINGS) == []
    assert site_policy.apply(wire.config_of(wire.config_record(default_config())), SETTINGS) == []
    asked = {
        "model": "owner/model",
        "heldout_sources": ("chat:held_out.jsonl#heldout",),
        "eval__tasks": ("hhh=chat:prompts.jsonl", "utility"),
        "chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    }
    allow = ("owner/model", "held_out.jsonl", "prompts.jsonl")
    site_policy.apply(sent(**asked), SETTINGS._replace(allow=allow))
    for missing in allow:
        fewer = tuple(one for one in allow if one != missing)
        with pytest.raises(PolicyError, match=missing):
            site_policy.apply(sent(**asked), SETTINGS._replace(allow=fewer))


def test_the_operators_model_is_used_whatever_the_server_names():
    config = sent(model="owner/model")
    site_policy.apply(config, SETTINGS._replace(model="/mine/model"))
    assert config.model == "/mine/model"


WEAKER = {
    "kind": {"filter__kind": "simulated", "filter__simulated_recall": 0.0},
    "threshold": {"filter__threshold": 0.999},
    "action": {"filter__action": "weight"},
    "training": {"filter__epochs": 1, "filter__learning_rate": 1e-9},
    "target": {"filter__target": "recall", "filter__precision_floor": 1.0},
    "length": {"filter__max_length": 1},
    "other": {"filter__load": "/server/filter"},
}


@pytest.fixture
def own_filter(tmp_path):
    (tmp_path / "filter.json").write_text('{"kind": "guardian"}')
    return str(tmp_path)


@pytest.mark.parametrize("fields", WEAKER.values(), ids=list(WEAKER))
def test_no_config_weakens_the_filter_that_an_operator_demands(fields, own_filter):
    wanted = default_config().filter.to_dict()
    config = sent(**fields)
    (line,) = site_policy.apply(config, SETTINGS._replace(require_filter=True))
    assert config.filter.to_dict() == wanted
    assert all(name.replace("__", ".") in line for name in fields)
    config = sent(**fields)
    site_policy.apply(config, SETTINGS._replace(filter=own_filter))
    assert config.filter.to_dict() == wanted | {"load": own_filter, "kind": "guardian"}


def test_a_run_without_filter_is_refused_where_an_operator_demands_one(own_filter):
    config = sent(arms=("base", "fl+cai"))
    for settings in ({"filter": own_filter}, {"require_filter": True}):
        with pytest.raises(FilterError, match="trains without a filter"):
            site_policy.apply(config, SETTINGS._replace(**settings))
    assert site_policy.apply(config, SETTINGS) == []


@pytest.mark.parametrize("text", ["", "[]", "5", "{}", '{"kind": "simulated"}', '{"kind": [1]}'])
def test_a_damaged_filter_of_the_operator_lets_nothing_pass(text, own_filter, tmp_path):
    (tmp_path / "filter.json").write_text(text)
    with pytest.raises(FilterError, match="the filter is damaged"):
        site_policy.apply(sent(), SETTINGS._replace(filter=own_filter))


def test_settings_have_types(folder):
    given = node_config(folder, 1) | {
        "require-filter": True, "allow": "owner/model, prompts.jsonl,", "filter": "/mine/filter"
    }  # fmt: skip
    settings = site_policy.settings_of(given)
    assert settings.require_filter is True and settings.allow == ("owner/model", "prompts.jsonl")
    for change, message in (
        ({"require-filter": "yes"}, "require-filter='yes': expected true or false"),
        ({"require-filter": 1}, "require-filter=1: expected true or false"),
        ({"client": True}, "client=True: expected a number from 0 on"),
        ({"model": 5}, "model=5: expected text"),
    ):
        with pytest.raises(SettingsError, match=message):
            site_policy.settings_of(given | change)


def test_rounds_and_steps_have_bounds():
    here = object.__new__(site.Site)
    here.config = default_config()
    for t, steps in ((-1, 1), (6, 1), (0, 11), (0, -1), (0.0, 1), ("0", 1), (0, 10**30)):
        with pytest.raises(ConfigError, match="expected 0 to"):
            here.train({}, t, steps)


@pytest.mark.parametrize("name", sorted(set(site.BASE_FILES) - {"*.safetensors"}))
def test_the_fingerprint_covers_each_file_that_makes_tokens(name, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(ROOT / "fedsafe_jax/assets/model", copy)
    before = site.base_fingerprint(str(copy))
    assert before == site.base_fingerprint("package:model")
    path = copy / name.replace("*", "model")
    path.write_text((path.read_text() if path.is_file() else "") + " ")
    assert site.base_fingerprint(str(copy)) != before
