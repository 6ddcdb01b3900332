"""Answers of the base model itself to harmless requests: what alignment must leave as it is.

Requests that look harmful and are not are what an aligned model comes to refuse. Replayed with the
base's own answers, they teach it nothing but where the border is.
"""

import collections
import functools

import jax
from etils import epath
from ml_collections import ConfigDict

from fedsafe_jax import whole_files
from fedsafe_jax.cai.revise import parse_check
from fedsafe_jax.data import chat
from fedsafe_jax.data.examples import SAFE, Example
from fedsafe_jax.evals import judges
from fedsafe_jax.pipeline.evaluation import judge_tools
from fedsafe_jax.pipeline.inputs import RunInputs
from fedsafe_jax.runtime import multihost, run_files
from fedsafe_jax.whole_files import WorkdirError

NAME = "own_answers.jsonl"
JUDGE = "rules"  # tells refusals where `cai.check` names no judge of refusal
BATCH = 32  # requests answered at once


class OwnAnswers:
    """The base model's answers to the requests of `cai.harmless_sources`, made once in a run.

    They are greedy, so they depend on the model and the requests alone. A file keeps them for the
    reader, and for a run that continues.

    Args:
      config, inputs: config and inputs of the run.
      folder: folder of the file, `cai/`.
    """

    def __init__(self, config: ConfigDict, inputs: RunInputs, folder: epath.Path):
        self._config, self._inputs, self._path = config, inputs, folder / NAME

    @functools.cached_property
    def examples(self) -> list[Example]:
        """Requests with the answers that may be imitated: no refusal, and not empty.

        An answer that was cut at `cai.max_new_tokens` is marked as not ended.
        """
        return [
            asked._replace(response=row["answer"], label=SAFE, ended=row["finished"])
            for asked, row in zip(self._inputs.harmless, self._rows, strict=True)
            if not row["dropped"]
        ]

    @functools.cached_property
    def counts(self) -> dict[str, int]:
        """Requests, those whose answers are kept, and the others by the reason: refused, empty."""
        reasons = collections.Counter(row["dropped"] or "kept" for row in self._rows)
        return {"asked": len(self._rows)} | dict(reasons)

    @functools.cached_property
    def _rows(self) -> list[dict]:
        if not self._inputs.harmless:
            return []
        asked = [chat.to_dicts(e.messages) for e in self._inputs.harmless]
        # Where several processes generate together, none may skip what the others do.
        if jax.process_count() == 1 and (rows := self._kept(asked)):
            return rows
        answers, finished = self._inputs.lm.answer_dialogues(
            [e.messages for e in self._inputs.harmless],
            self._config.cai.max_new_tokens,
            batch_size=BATCH,
            truncate=True,
        )
        spec = parse_check(self._config.cai.check).refusal or JUDGE
        refuses = judges.refuses(spec, judge_tools(self._config))
        refused = refuses([e.messages for e in self._inputs.harmless], answers)
        rows = [
            {
                "messages": messages,
                "answer": answer,
                "finished": bool(ended),
                "dropped": "refused" if no else "" if answer.strip() else "empty",
            }
            for messages, answer, ended, no in zip(asked, answers, finished, refused, strict=True)
        ]
        if multihost.is_primary():
            whole_files.write(self._path, whole_files.to_json_lines(rows))
        return rows

    def _kept(self, asked: list) -> list[dict]:
        """Returns the rows of the file; [] where it holds other requests, or is damaged."""
        fields = {"messages": list, "answer": str, "dropped": str}
        try:
            rows = run_files.read_lines(self._path, fields)
        except WorkdirError:
            return []
        whole = all(isinstance(row.get("finished"), bool) for row in rows)
        return rows if whole and [row["messages"] for row in rows] == asked else []
