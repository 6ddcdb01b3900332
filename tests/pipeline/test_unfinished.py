"""What is kept of an evaluation that has not ended."""

import pytest

from fedsafe_jax.evals.judges import EndpointError
from fedsafe_jax.evals.task import EvalOptions, EvalSet
from fedsafe_jax.pipeline import evaluation
from fedsafe_jax.pipeline.unfinished import Unfinished


class Task:
    """A task that counts its runs, and asks its endpoint once."""

    def __init__(self):
        self.runs = 0

    def run(self, lm, items, options):
        self.runs += 1
        return {"said": options.endpoint([{"role": "user", "content": items[0]}])}


def test_ended_tasks_and_replies_are_of_one_adapter(tmp_path):
    path, first, second, asked = tmp_path / "u.json", Task(), Task(), []
    sets = {"a": EvalSet(first, "", ("x",)), "b": EvalSet(second, "", ("y",))}

    def endpoint(messages, broken):
        asked.append(messages[0]["content"])
        if asked[-1] == broken:
            raise EndpointError("down")
        return asked[-1].upper()

    def evaluate(about, broken=""):
        kept = Unfinished(path, about)
        options = EvalOptions(endpoint=kept.keeping(lambda messages: endpoint(messages, broken)))
        return evaluation.evaluate(None, sets, options, kept)

    with pytest.raises(EndpointError, match="down"):
        evaluate("one", broken="y")
    assert evaluate("one") == {"a": {"said": "X"}, "b": {"said": "Y"}}
    assert (first.runs, second.runs, asked) == (1, 2, ["x", "y", "y"])
    # Another adapter gave other answers: nothing of the first one's is taken.
    evaluate("two")
    assert (first.runs, asked[3:]) == (2, ["x", "y"])


@pytest.mark.parametrize(
    "content",
    ["", "5", "[]", "{}", '{"about": "a", "outcomes": {"t": 1}, "replies": {}}',
     '{"about": "a", "outcomes": {}, "replies": {"k": 1}}', "[" * 100_000],
)  # fmt: skip
def test_a_damaged_file_is_set_aside(tmp_path, content):
    path = tmp_path / "u.json"
    path.write_text(content)
    kept = Unfinished(path, "a")
    assert (kept.outcomes, kept.replies) == ({}, {})
    assert (tmp_path / "u.json.damaged").read_text() == content
