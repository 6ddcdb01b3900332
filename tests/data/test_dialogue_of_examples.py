"""What an example says of its dialogue."""

from fedsafe_jax.data.examples import Example


def test_one_turn_is_its_own_dialogue():
    example = Example((("user", "Hello?"),), "Hi.")
    assert example.prompt == example.dialogue == "Hello?"


def test_all_turns_are_in_the_dialogue():
    turns = (("system", "Be brief."), ("user", "A?"), ("assistant", "B."), ("user", "C?"))
    example = Example(turns, "D.")
    assert example.prompt == "C?"
    assert example.dialogue == "system: Be brief.\n\nuser: A?\n\nassistant: B.\n\nuser: C?"


def test_the_prompt_is_the_last_user_turn_behind_a_tool_turn():
    example = Example((("user", "Time?"), ("assistant", "clock()"), ("tool", "12:00")), "Noon.")
    assert example.prompt == "Time?"
