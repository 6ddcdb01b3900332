"""Flagged answers that turn into refusals, as clients train on them."""

import numpy as np
import pytest
from commands import NO_ANSWERS, rows, run

from fedsafe_jax.cai import derta
from fedsafe_jax.data import chat
from fedsafe_jax.data.examples import Example
from fedsafe_jax.data.packing import pack
from fedsafe_jax.data.refusals import REFUSAL
from fedsafe_jax.filters.actions import turn
from fedsafe_jax.pipeline import clients

ASKED = (("user", "How do I pick a lock?"),)
SAID = " ".join(["Sure, first take a pin and then push each of the pins up until it is set."] * 3)
WORD = " Sorry"


def of(said: str = SAID) -> Example:
    return turn(Example(ASKED, said, "unsafe"), 0.9).example


def test_a_turned_pair_is_two_rows_that_share_its_weight(packaged):
    tokenizer = packaged.tokenizer
    refusal = derta.refusal_token(tokenizer, WORD)
    plain = Example(ASKED, "No.", "safe")
    rows_, lost = clients.encode(
        tokenizer, [plain, of()], seq_len=128, weights=[1.0, 0.5], refusal_word=WORD
    )
    first, behind, away = rows_
    assert lost == 0 and clients.learned(rows_) == pytest.approx(1.5)
    np.testing.assert_array_equal(first.ids, chat.encode(tokenizer, ASKED, "No.", 128).ids)
    assert set(behind.loss_mask) == {0, 0.25} == set(away.loss_mask)
    # The refusal is learned behind words of the answer, which are not.
    assert tokenizer.decode(behind.ids[behind.loss_mask > 0]).strip().startswith(REFUSAL)
    # Along the whole answer a twentieth of the positions learns the first token of a refusal.
    whole = chat.encode(tokenizer, ASKED, SAID, 128)
    np.testing.assert_array_equal(away.ids, whole.ids)
    assert (away.loss_mask > 0).sum() == -(-whole.loss_mask.sum() // 20)
    packed = pack(rows_, 384)
    longest_first = sorted(rows_, key=lambda row: -len(row.ids))
    segment = 1 + [row is away for row in longest_first].index(True)
    turned = (packed.segment_ids == segment) & (packed.mask > 0)
    assert set(packed.targets[turned]) == {refusal}
    own = (packed.mask > 0) & ~turned
    following = np.roll(packed.tokens, -1, axis=1)
    np.testing.assert_array_equal(packed.targets[own], following[own])


def test_where_an_answer_turns_is_of_the_pair_alone(packaged):
    def rows_of(*examples):
        return clients.encode(packaged.tokenizer, examples, 128, refusal_word=WORD)[0]

    alone = rows_of(of())
    beside = rows_of(of("Another answer that is long enough to turn."), of())[2:]
    for one, other in zip(alone, beside, strict=True):
        np.testing.assert_array_equal(one.ids, other.ids)
        np.testing.assert_array_equal(one.loss_mask, other.loss_mask)
    sizes = {len(rows_of(of(f"{SAID} {i}"))[0].ids) for i in range(12)}
    assert len(sizes) > 3  # prefixes of many lengths


def test_a_run_whose_filter_turns_what_it_flags(tmp_path):
    run(
        tmp_path,
        "arms=('fl+filter',)",
        NO_ANSWERS,
        "filter.kind=simulated",
        "filter.simulated_recall=1.0",
        "filter.simulated_precision=1.0",
        "filter.action=turn",
    )
    done = rows(tmp_path)
    assert all(r["filter"]["rewritten"] and not r["filter"]["dropped"] for r in done)
