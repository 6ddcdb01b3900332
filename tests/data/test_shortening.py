"""What is left of dialogues that are too long."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsafe_jax.data import shortening
from fedsafe_jax.data.shortening import GAP, without_middle


class Letters:
    """A tokenizer whose tokens are letters."""

    def __call__(self, text, add_special_tokens):
        return {"input_ids": list(text)}

    def decode(self, ids):
        return "".join(ids)


def rendered(messages):
    return "".join(f"<{role}>{text}" for role, text in messages) + "<assistant>"


def shorten(messages, room):
    left, places = shortening.shorten(messages, lambda turns: len(rendered(turns)) <= room)
    assert [role for role, _ in left] == [messages[place][0] for place in places]
    return tuple(left)


SYSTEM, OLD, REPLY, LAST = (
    ("system", "s" * 20), ("user", "o" * 50), ("assistant", "r" * 20), ("user", "l" * 100),
)  # fmt: skip


@pytest.mark.parametrize(
    ("room", "left"),
    [
        (300, (SYSTEM, OLD, REPLY, LAST)),
        (170, (SYSTEM, LAST)),  # a reply without its question is left out as well
        (140, (SYSTEM, ("user", "l" * 44 + GAP + "l" * 44))),
        # Room for a few words of the request comes before the end of the system prompt.
        (110, (("system", "s" * 14), ("user", "l" * 32 + GAP + "l" * 32))),
        (60, (("system", ""), ("user", "l" * 14 + GAP + "l" * 14))),
    ],
)
def test_the_oldest_turns_go_first(room, left):
    found = shorten((SYSTEM, OLD, REPLY, LAST), room)
    assert found == left and len(rendered(found)) <= room


def test_turns_behind_the_request_lose_their_middle_too():
    turns = (OLD, REPLY, ("user", "ask" * 30), ("assistant", "call"), ("tool", "found" * 30))
    request, call, result = shorten(turns, 120)
    assert call == ("assistant", "call")
    # Tool and request end equally long, and each keeps its beginning and end.
    assert len(request[1]) == len(result[1]) and 110 < len(rendered((request, call, result))) <= 120
    for (_, left), whole in ((request, "ask" * 30), (result, "found" * 30)):
        assert left == without_middle(whole, len(left) - len(GAP)) and len(left) > len(GAP) + 16


def test_a_request_keeps_its_beginning_and_end_and_a_system_prompt_its_beginning():
    whole = "".join(chr(ord("A") + i % 26) for i in range(100))
    messages = (("system", "abcdefghijklmnopqrst"), ("user", whole))
    (_, system), (_, request) = shorten(messages, 105)
    assert system == "abcdefghijklmnopqrst"[: len(system)] and len(system) >= 8
    beginning, end = request.split(GAP)
    assert whole.startswith(beginning) and whole.endswith(end)
    assert len(beginning) == len(end) == 32


@given(
    st.lists(
        st.tuples(st.sampled_from(["user", "assistant", "tool"]), st.text("ab", max_size=60)),
        max_size=6,
    ),
    st.text("s", max_size=40),
    st.text("l", max_size=160),
    st.integers(60, 300),
)
def test_what_is_left_fits_and_ends_in_the_request(before, system, last, room):
    messages = ((("system", system),) if system else ()) + (*before, ("user", last))
    found = shorten(messages, room)
    assert len(rendered(found)) <= room
    role, said = found[-1]
    beginning, _, end = said.partition(GAP)
    assert role == "user" and last.startswith(beginning) and last.endswith(end)
    assert (found[0][0] == "system") == bool(system)
    if len(rendered(messages)) <= room:
        assert found == messages
    else:
        assert found[bool(system)][0] == "user" or found[1:] == messages[1:]


def test_nothing_is_left_where_not_even_empty_turns_fit():
    assert shortening.shorten((SYSTEM, LAST), lambda turns: False) is None


def test_texts_are_cut_by_tokens():
    assert shortening.beginning_of(Letters(), "abcdef", 4) == "abcd"
    assert shortening.end_of(Letters(), "abcdef", 4) == "cdef"
    assert shortening.end_of(Letters(), "abcdef", 9) == "abcdef"


def test_shares_give_what_the_other_leaves():
    assert shortening.shares(10, 10, 30) == (10, 10)
    assert shortening.shares(100, 100, 30) == (15, 15)
    assert shortening.shares(5, 100, 30) == (5, 25)
    assert shortening.shares(100, 5, 30) == (25, 5)
    assert shortening.shares(0, 100, 30) == (0, 30)
