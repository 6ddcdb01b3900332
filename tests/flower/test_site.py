"""A site: the settings of its operator, its description, the state it keeps."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from etils import epath

pytest.importorskip("flwr")

from flwr.app import ConfigRecord, RecordDict  # noqa: E402
from test_flower import node_config, run_config  # noqa: E402

from fedsafe_jax.config import ConfigError  # noqa: E402
from fedsafe_jax.data import chat  # noqa: E402
from fedsafe_jax.flower import replies, server, site, site_policy  # noqa: E402
from fedsafe_jax.models import lora  # noqa: E402
from fedsafe_jax.whole_files import WorkdirError  # noqa: E402


def test_settings_are_read_and_checked(folder):
    settings = site_policy.settings_of(
        node_config(folder, 1) | {"partition-id": 1, "num-partitions": 3}
    )
    assert settings == site_policy.SiteSettings(
        client=1,
        sources=("chat:site1.jsonl",),
        data_dir=str(folder),
        workdir=str(folder / "work1"),
    )
    for change, message in (
        ({"client": "1"}, "client='1': expected a number from 0 on"),
        ({"color": "red"}, "color: no such key"),
    ):
        with pytest.raises(ConfigError, match=message):
            site_policy.settings_of(node_config(folder, 1) | change)
    with pytest.raises(ConfigError, match="no such key; expected client, sources"):
        site_policy.settings_of({"client": 0, "source": "x"})


@pytest.fixture(scope="module")
def site_and_lines(folder, tmp_path_factory):
    """A site, and the lines that it wrote while it loaded and filtered its pairs."""
    workdir = tmp_path_factory.mktemp("site")
    settings = site_policy.settings_of(node_config(folder, 1) | {"workdir": str(workdir)})
    lines = []
    return site.Site(server.read_config(run_config(workdir)), settings, lines.append), lines


def test_a_site_describes_its_pairs(site_and_lines):
    here, lines = site_and_lines
    said = here.describe()
    # The fixture wrote 10 safe and 5 unsafe pairs; no count tells which are unsafe. Some are near
    # an evaluation prompt, or held out.
    assert said["client"] == 1 and said["data"]["read"] == 15
    dropped = ("disputed", "dropped_near_evaluation", "dropped_heldout", "without_answer")
    assert said["data"]["kept"] + sum(said["data"][name] for name in dropped) == 15
    assert said["filter"]["kept"] + said["filter"]["dropped"] == said["data"]["kept"] > 10
    assert said["examples"] == said["filter"]["kept"] == len(here.encoded) == said["learned"]
    assert not any(name.startswith("unsafe") for name in said["filter"])
    assert said["base"] == site.base_fingerprint("package:model")
    assert f"client 1: {said['examples']} pairs to train on" in lines
    cut = sum(chat.CUT in one.notes for one in here.encoded)
    assert cut and f"client 1: {cut} of {said['examples']} pairs: {chat.CUT}" in lines


def test_a_site_weighs_what_it_learns_from(site_and_lines):
    here, _ = site_and_lines
    said = here.describe()

    def read(**changes):
        whole = json.dumps(said | changes)
        return replies.read_description(RecordDict({"site": ConfigRecord({"json": whole})}))

    assert read()["learned"] == read()["examples"] == len(here.encoded)
    assert read(learned=0.25)["learned"] == 0.25
    for wrong in (-1.0, float("nan"), float("inf"), len(here.encoded) + 1.0):
        with pytest.raises(replies.ReplyError, match="expected 0 to"):
            read(learned=wrong)


def test_a_repeated_round_starts_from_the_state_before_it(site_and_lines):
    here, _ = site_and_lines
    factors = lora.init(jax.random.key(0), here.inputs.lm.config, here.inputs.lora)
    # SCAFFOLD's control of the server; the site keeps its own between rounds.
    message = {"adapter": factors, "control": jax.tree.map(np.zeros_like, factors)}

    def update(t):
        return here.train(message, t=t, steps=3).sent.updates

    first, second = update(0), update(1)
    assert first.shape[0] == 1 and np.abs(first).max() > 0
    states = sorted((here.folder / "state").iterdir())
    assert [path.name for path in states] == ["round_0000.safetensors", "round_0001.safetensors"]
    np.testing.assert_array_equal(update(0), first)
    np.testing.assert_array_equal(update(1), second)
    for path in states:
        path.unlink()
    assert not np.array_equal(update(1), second)


def test_a_damaged_state_of_a_client_is_one_line_and_stays(tmp_path):
    damaged = object.__new__(site.Site)
    damaged.folder = epath.Path(tmp_path)
    algorithm = SimpleNamespace(init_client=lambda factors: {"a": np.zeros(2)})
    damaged.programs = SimpleNamespace(spec=SimpleNamespace(algorithm=algorithm))
    path = tmp_path / "state" / "round_0000.safetensors"
    path.parent.mkdir()
    path.write_bytes(b"cut")
    with pytest.raises(WorkdirError, match="the state of this client is damaged") as error:
        damaged._state_before(1, None)
    assert str(path) in str(error.value) and path.read_bytes() == b"cut"
