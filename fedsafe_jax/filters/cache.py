"""Scores of pairs kept under the workdir, by the content of filter and pair."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath

from fedsafe_jax import whole_files
from fedsafe_jax.data.examples import Example
from fedsafe_jax.filters.decision import Decision, FilterError, is_finite
from fedsafe_jax.filters.protocol import SafetyFilter

VERSION = 2  # of the files and of how pairs are scored; files of another one are not read
LARGEST = float(np.finfo(np.float32).max)  # scores are float32


def content_hash(*parts: object) -> str:
    """Hashes JSON-like content, to 32 hexadecimal digits."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=list)
    return hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()[:32]


def pair_hash(pair: Example) -> str:
    """Hashes what a filter reads of a pair: all turns of the dialogue, and the response."""
    request = pair.messages[0][1] if len(pair.messages) == 1 else pair.messages
    return content_hash(request, pair.response)


def folder_hash(folder: str | os.PathLike, patterns: Sequence[str] = ("*",)) -> str:
    """Hashes the files in a folder that match, subfolders left out.

    A filter that was trained again in the same folder gets another hash, so its pairs are scored
    anew.
    """
    digest = hashlib.sha256()
    matching = {p for pattern in patterns for p in pathlib.Path(folder).glob(pattern)}
    for path in sorted(p for p in matching if p.is_file()):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.name} {content}".encode())
    return digest.hexdigest()[:32]


class ScoreCache:
    """Raw log-odds of one filter.

    Args:
      folder: folder of all caches; holds one file per filter.
      fingerprint: hash of the filter's settings, seed and training pairs.
      writes: False where another process of the run writes the file.

    Whoever may write to the folder decides what is flagged: a score that was changed into another
    number is believed.

    Raises:
      StorageError: the file cannot be read; `log_odds` raises it where it cannot be written.
    """

    def __init__(self, folder: epath.PathLike, fingerprint: str, writes: bool = True):
        self._writes = writes
        self._path = epath.Path(folder) / f"{fingerprint}.v{VERSION}.json"
        self._known: dict[str, float] = {}
        self.decision: Decision | None = None
        if stored := self._stored():
            self._known, self.decision = stored

    def log_odds(
        self, pairs: Sequence[Example], make_filter: Callable[[], SafetyFilter]
    ) -> np.ndarray:
        """Returns the scores, float32 `[n]`.

        Args:
          pairs: pairs to score; equal ones are scored once.
          make_filter: called when a pair is not known, or the filter's decision is not.

        Raises:
          FilterError: a score is not finite.
        """
        keys = [pair_hash(p) for p in pairs]
        missing = {k: p for k, p in zip(keys, pairs, strict=True) if k not in self._known}
        if missing or self.decision is None:
            safety_filter = make_filter()
            scores = safety_filter.log_odds(list(missing.values()))
            safety_filter.decision.probability(scores)  # raises before a wrong one is kept
            self._known |= {k: float(s) for k, s in zip(missing, scores, strict=True)}
            self.decision = safety_filter.decision
            self._write()
        return np.array([self._known[k] for k in keys], np.float32)

    def _stored(self) -> tuple[dict[str, float], Decision] | None:
        """Returns the scores that are kept; damaged ones are set aside, and computed anew."""
        if not self._writes:  # not to rename what the process that writes is reading
            with contextlib.suppress(ValueError, RecursionError):
                return _checked(json.loads(whole_files.read(self._path) or b"null"))
            return None
        stored = whole_files.read_json(self._path)
        try:
            return _checked(stored)
        except ValueError as error:
            whole_files.set_aside(self._path, str(error))
            return None

    def _write(self) -> None:
        if self._writes:
            decision = dataclasses.asdict(self.decision)
            content = {"decision": decision, "log_odds": self._known}
            whole_files.write(self._path, whole_files.to_json(content))


def _checked(stored: Any) -> tuple[dict[str, float], Decision] | None:
    """Returns the scores and the decision that a file holds; None where there is no file.

    Raises:
      ValueError: it holds something else, such as a score that is no finite number.
    """
    if stored is None:
        return None
    try:
        scores, decision = stored["log_odds"], Decision(**stored["decision"])
        wrong = [k for k, x in scores.items() if not (is_finite(x) and abs(x) <= LARGEST)]
    except (TypeError, KeyError, AttributeError, FilterError) as error:
        raise ValueError(f"expected log_odds and decision ({error!r:.80})") from None
    if wrong:
        raise ValueError(f"{len(wrong)} of {len(scores)} scores are no finite numbers")
    return scores, decision
