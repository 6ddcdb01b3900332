"""A workdir on a bucket: every file but checkpoints, which Orbax writes there by itself."""

import base64

import jax
import numpy as np
import pytest

from fedsafe_jax.filters import cache
from fedsafe_jax.filters.decision import Decision
from fedsafe_jax.models import lora
from fedsafe_jax.pipeline import export
from fedsafe_jax.report.blocks import figure
from fedsafe_jax.runtime import run_files
from fedsafe_jax.runtime.client_updates import ClientUpdates


@pytest.fixture
def workdir(bucket):
    return bucket / "run"


def test_records_of_a_run(workdir):
    assert not run_files.claim_workdir(workdir, {"rounds": 3})
    assert run_files.claim_workdir(workdir, {"rounds": 3})
    with pytest.raises(run_files.WorkdirError, match="rounds=3"):
        run_files.claim_workdir(workdir, {"rounds": 4})
    path = workdir / "cai" / "round_000.jsonl"
    run_files.replace_lines(path, lambda row: False, [{"a": 1}, {"a": 2}])
    run_files.replace_lines(path, lambda row: row["a"] == 1, [{"a": 3}])
    assert [row["a"] for row in run_files.read_lines(path)] == [2, 3]
    assert [p.name for p in (workdir / "cai").glob("round_*.jsonl")] == ["round_000.jsonl"]
    scores = cache.ScoreCache(workdir / "filter_scores", "f")
    scores.decision = Decision(1.0, 0.25)
    scores._write()
    assert cache.ScoreCache(workdir / "filter_scores", "f").decision == Decision(1.0, 0.25)


def test_updates_of_clients(workdir):
    start = {"layers": {"mlp": {"up_proj": {"a": np.ones((1, 4, 2)), "b": np.zeros((1, 2, 3))}}}}
    kept = ClientUpdates(workdir / "updates" / "fl" / "seed0")
    assert kept.rounds() == []
    for done in (1, 2, 10):
        kept.write_start(done, start)
        kept.write(done, 7, np.arange(14.0) + done, like=start)
    kept.keep([2, 10])
    assert kept.rounds() == [2, 10] and kept.clients(10) == [7] and kept.clients(1) == []
    began, update = kept.read(10, 7)
    jax.tree.map(np.testing.assert_array_equal, began, start)
    flat = np.concatenate([x.ravel() for x in jax.tree.leaves(update)])
    np.testing.assert_array_equal(flat, np.arange(14.0) + 10)
    assert jax.tree.structure(update) == jax.tree.structure(start)


def test_figures_and_exports(workdir, packaged):
    def draw(plt):
        return plt.figure()

    (workdir / "figures").mkdir(parents=True)
    drawn = figure(workdir / "figures" / "a_b.png", draw)
    written = (workdir / "figures" / "a_b.png").read_bytes()
    assert written[1:4] == b"PNG" and base64.b64decode(drawn.png) == written
    assert drawn.alt == "a b"
    shape = lora.LoraConfig(2, 4.0, ("q_proj",))
    factors = lora.init(jax.random.key(0), packaged.config, shape)
    export.export(packaged, lora.Adapter(factors, shape), workdir / "export", "a card")
    assert (workdir / "export" / "merged" / "model.safetensors").stat().length > 1e6
    assert (workdir / "export" / "adapter" / "README.md").read_text() == "a card"
    assert np.isfinite(workdir.joinpath("export/adapter/adapter_model.safetensors").stat().length)
