"""The config files that are shipped: each form is one that `fedsafe run` takes."""

import runpy

import pytest
from commands import ROOT

from fedsafe_jax.config import ConfigError
from fedsafe_jax.validation import validate

FORMS = {
    "align": ("", "public"),
    "demo": (),
    "lab": ("", "smoke"),
    "openfedllm": ("fedavg", "scaffold", "fedadam"),
    "paper": ("fedavg", "scaffold"),
    "smollm": ("", "scaffold", "gpu", "gpu_scaffold"),
}


def get_config(name, *form):
    return runpy.run_path(str(ROOT / f"configs/{name}.py"))["get_config"](*form)


@pytest.mark.parametrize(
    ("name", "form"), [(n, form) for n, forms in FORMS.items() for form in forms or (None,)]
)
def test_every_form_of_a_config_is_valid(name, form):
    validate(get_config(name) if form is None else get_config(name, form))


@pytest.mark.parametrize("name", ["align", "lab", "paper", "smollm"])
def test_another_form_is_named_in_one_line(name):
    with pytest.raises(ConfigError, match=f"configs/{name}.py:nonsense: expected"):
        get_config(name, "nonsense")


def test_what_aligns_is_not_what_is_evaluated():
    config = get_config("align")
    evaluated = {task.partition("=")[2] for task in config.eval.tasks} - {""}
    trained = {*config.cai.red_team_sources, *config.cai.harmless_sources}
    assert evaluated and not evaluated & trained
