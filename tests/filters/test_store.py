"""Filters on disk."""

import json

import numpy as np
import pytest
from filter_examples import packaged_pairs

from fedsafe_jax.cli import filter_pairs
from fedsafe_jax.filters import classifier, guard, protocol, store
from fedsafe_jax.filters.training import TrainingOptions
from fedsafe_jax.inference import pretrained
from fedsafe_jax.models import lora

SHAPE = lora.LoraConfig(8, 16.0, ("q_proj", "v_proj"))


@pytest.fixture(scope="module")
def pairs():
    return packaged_pairs()


def test_filters_come_back_from_disk(tmp_path, packaged, pairs):
    options = TrainingOptions(epochs=1)
    trained = classifier.train(pairs[::4], packaged.tokenizer, 0, options=options)
    store.save(trained[0], tmp_path / "c")
    found = store.load(tmp_path / "c")
    assert found.decision == trained[0].decision
    np.testing.assert_array_equal(found.log_odds(pairs[:20]), trained[0].log_odds(pairs[:20]))
    options = TrainingOptions(epochs=1, batch_size=16, learning_rate=1e-3)
    made, _ = guard.train(pairs[::10], packaged, SHAPE, seed=0, options=options, max_length=96)
    store.save(made, tmp_path / "g")
    found = store.load(tmp_path / "g", pretrained.load_pretrained)
    np.testing.assert_allclose(found.score(pairs[:20]), made.score(pairs[:20]), atol=1e-6)
    with pytest.raises(protocol.FilterError, match="no filter.json"):
        store.load(tmp_path)
    about = json.loads((tmp_path / "c" / "filter.json").read_text())
    (tmp_path / "c" / "filter.json").write_text(json.dumps({"kind": about["kind"]}))
    with pytest.raises(protocol.FilterError, match="damaged"):
        store.load(tmp_path / "c")


def test_storage_that_does_not_answer_asks_for_no_training(tmp_path, monkeypatch):
    (tmp_path / "filter.json").write_text("{}")

    def silent(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(store, "read_json", silent)
    with pytest.raises(
        protocol.FilterError, match=r"cannot be read \(Permission denied\)"
    ) as error:
        store.load(tmp_path)
    assert "train it again" not in str(error.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"threshold": 7}, "threshold is 7"),
        ({"temperature": 0}, "temperature is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"bias": "0"}, "bias is '0'"),
        ({"at_bound": 1}, "at_bound 1"),
        ({"limit": 1}, "damaged"),
        ([0.5], "damaged"),
        (None, "damaged"),
    ],
)
def test_a_decision_that_lets_all_pass_is_one_line(tmp_path, damage, message):
    content = {"kind": "classifier", "decision": damage}
    (tmp_path / "filter.json").write_text(json.dumps(content))
    with pytest.raises(protocol.FilterError, match=message) as error:
        store.load(tmp_path)
    assert str(error.value).startswith(str(tmp_path)) and "\n" not in str(error.value)


@pytest.mark.parametrize("threshold", ["nan", "-0.1", "1.5", "inf"])
def test_a_threshold_that_flags_nothing_is_refused_first(tmp_path, threshold):
    with pytest.raises(protocol.FilterError, match="threshold is"):
        filter_pairs.score(str(tmp_path), [], "drop", float(threshold))
