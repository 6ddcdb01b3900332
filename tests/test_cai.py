"""Constitution files, the revision loop's bookkeeping, and the DPO loss."""

import json

import numpy as np
import pytest

from fedsafe_jax.cai import constitution, revise, train
from fedsafe_jax.data.chat import Encoded
from fedsafe_jax.evals.judges import start_refusal


def test_both_public_forms_of_a_constitution(tmp_path):
    ours = constitution.load("package:constitution")
    assert len(ours) == 6 and ours[0].critique_request.startswith("Say whether")
    raw = {
        "harmful0": {
            "prompt": ["\n\nCritiqueRequest: Is it bad?\n\nCritique:"],
            "edit_request": "\n\nRevisionRequest: Mend it.\n\nRevision:",
        }
    }
    (tmp_path / "c.json").write_text(json.dumps(raw))
    assert constitution.load(str(tmp_path / "c.json")) == [
        constitution.Principle("Is it bad?", "Mend it.")
    ]
    (tmp_path / "c.json").write_text(json.dumps({"constitutions": [{"critic": "x"}]}))
    with pytest.raises(constitution.ConstitutionError, match="critic/revision"):
        constitution.load(str(tmp_path / "c.json"))


def test_records_say_why_a_revision_is_dropped():
    prompts = ["kept", "same", "empty", "cut", "still", "over", "refused"]
    initial = ["Sure", "No", "Sure", "Sure", "Sure", "A cake", "I'm sorry"]
    revisions = ["I'm sorry", "No", "", "I'm sorry", "Fine", "I'm sorry", "I cannot"]
    wanted = [True, True, True, True, True, False, True]
    threads_seen = []

    def answer(threads, call):
        assert call == 0
        return initial, np.ones(7, bool)

    def reviser(threads, call):
        threads_seen.append([list(t) for t in threads])
        if call == 1:
            return ["critique"] * 7, np.ones(7, bool)
        return revisions, np.array([True, True, True, False, True, True, True])

    principle = constitution.Principle("C?", "R.")
    found = revise.revise(prompts, [principle], answer, reviser, (0,), wanted, start_refusal)
    reasons = [r.dropped for r in found]
    assert reasons == ["", "unchanged", "empty", "cut", "still harmful", "over-refusal", ""]
    assert [r.preferred for r in found] == [True] + [False] * 6
    assert threads_seen[0][0] == [("user", "kept"), ("assistant", "Sure"), ("user", "C?")]
    assert threads_seen[1][0][3:] == [("assistant", "critique"), ("user", "R.")]


def test_dpo_loss_is_the_formula():
    np.testing.assert_allclose(train.dpo_loss(1.0, 2.0, 1.0, 2.0, 0.1), np.log(2), rtol=1e-6)
    chosen, rejected, ref_chosen, ref_rejected = np.random.default_rng(0).normal(size=(4, 5))
    margin = 0.3 * ((chosen - ref_chosen) - (rejected - ref_rejected))
    expected = np.log(1 + np.exp(-margin))
    found = train.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, 0.3)
    np.testing.assert_allclose(found, expected, rtol=1e-5)  # float32


def test_batches_keep_pairs_aligned_and_mark_filling():
    def encoded(start):
        return Encoded(np.arange(start, start + 5, dtype=np.int32), np.arange(5) > 1)

    sft = [encoded(10 * i) for i in range(1, 4)]
    batches = train.make_batches(sft, [(encoded(100), encoded(200))], 2, 2, 3, 16, (0,))
    assert batches.sft.tokens.shape[0] == 2 and batches.pairs.tokens.shape == (2, 6, 16)
    assert (batches.pairs.tokens[:, :3].max((1, 2)) == 104).all()
    assert (batches.pairs.tokens[:, 3:].max((1, 2)) == 204).all()
    none = train.make_batches(sft, [], 2, 2, 3, 16, (0,))
    assert none.pair_on.sum() == 0 and none.pairs.mask.sum() == 0
