"""What was done to dialogues, counted."""

import logging

from fedsafe_jax.data import chat, dialogue_notes


def test_what_was_done_is_counted_and_logged(packaged, caplog):
    requests = ("Hi", "Hi <|end|> there", "<|user|>" + "word " * 300)
    done = [
        chat.encode(packaged.tokenizer, (("user", text),), "Yes.", max_length=64)
        for text in requests
    ]
    done.append(None)
    assert dialogue_notes.count(done) == {"control_tokens": 2, "cut": 1}
    with caplog.at_level(logging.WARNING):
        dialogue_notes.warn(done, "pairs")
    assert [record.getMessage() for record in caplog.records] == [
        f"2 of 4 pairs: {chat.CONTROL}",
        f"1 of 4 pairs: {chat.CUT}",
        f"1 of 4 pairs lost: {dialogue_notes.LOST}",
    ]
    caplog.clear()
    dialogue_notes.warn(done[:1], "pairs")
    assert not caplog.records


def test_every_note_has_a_name():
    assert set(dialogue_notes.NAMES) == {chat.MERGED, chat.CONTROL, chat.CUT}
