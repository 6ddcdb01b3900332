"""What is left of dialogues that are too long."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsafe_jax.data import fitting


class Letters:
    """A tokenizer whose tokens are letters."""

    def __call__(self, text, add_special_tokens):
        return {"input_ids": list(text)}

    def decode(self, ids):
        return "".join(ids)


def rendered(messages):
    return "".join(f"<{role}>{text}" for role, text in messages) + "<assistant>"


def fit(messages, room):
    return fitting.fit(Letters(), messages, lambda turns: len(rendered(turns)), room)


SYSTEM, OLD, REPLY, LAST = (
    ("system", "s" * 20), ("user", "o" * 50), ("assistant", "r" * 20), ("user", "l" * 20),
)  # fmt: skip


@pytest.mark.parametrize(
    ("room", "left"),
    [
        (200, (SYSTEM, OLD, REPLY, LAST)),
        (90, (SYSTEM, LAST)),  # a reply without its question is left out as well
        (60, (("system", "s" * 17), ("user", "l" * 18))),
    ],
)
def test_the_oldest_turns_go_first(room, left):
    messages = (SYSTEM, OLD, REPLY, LAST)
    found = fit(messages, room)
    assert len(rendered(found)) <= room
    if room > 60:
        assert found == left
    else:  # both lose about as much
        assert [role for role, _ in found] == ["system", "user"]
        assert abs(len(found[0][1]) - len(found[1][1])) <= 10


def test_a_request_keeps_its_end_and_a_system_prompt_its_beginning():
    messages = (("system", "abcdefghijklmnopqrst"), ("user", "ABCDEFGHIJKLMNOPQRST"))
    (_, system), (_, request) = fit(messages, 55)
    assert system == "abcdefghijklmnopqrst"[: len(system)] and len(system) >= 8
    assert request == "ABCDEFGHIJKLMNOPQRST"[-len(request) :] and len(request) >= 8


@given(
    st.lists(
        st.tuples(st.sampled_from(["user", "assistant", "tool"]), st.text("ab", max_size=60)),
        max_size=6,
    ),
    st.text("s", max_size=40),
    st.text("l", max_size=60),
    st.integers(60, 300),
)
def test_what_is_left_fits_and_ends_in_the_request(before, system, last, room):
    messages = ((("system", system),) if system else ()) + (*before, ("user", last))
    found = fit(messages, room)
    assert len(rendered(found)) <= room
    assert found[-1][0] == "user" and last.endswith(found[-1][1])
    assert (found[0][0] == "system") == bool(system)
    if len(rendered(messages)) <= room:
        assert found is messages


def test_shares_give_what_the_other_leaves():
    assert fitting.shares(10, 10, 30) == (10, 10)
    assert fitting.shares(100, 100, 30) == (15, 15)
    assert fitting.shares(5, 100, 30) == (5, 25)
    assert fitting.shares(100, 5, 30) == (25, 5)
    assert fitting.shares(0, 100, 30) == (0, 30)
