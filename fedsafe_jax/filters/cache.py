"""Scores of pairs kept under the workdir, by the content of filter and pair."""

import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
from etils import epath

from fedsafe_jax.data.examples import Example
from fedsafe_jax.filters.protocol import SafetyFilter


def content_hash(*parts: object) -> str:
    """Hashes JSON-like content, to 32 hexadecimal digits."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=list)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def pair_hash(pair: Example) -> str:
    """Hashes the fields of a pair that a filter reads (prompt and response)."""
    return content_hash(pair.prompt, pair.response)


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
    """

    def __init__(self, folder: epath.PathLike, fingerprint: str, writes: bool = True):
        self._writes = writes
        self._path = epath.Path(folder) / f"{fingerprint}.json"
        self._known: dict[str, float] = {}
        self.decision: list[float] | None = None
        if self._path.is_file():
            stored = json.loads(self._path.read_text(encoding="utf-8"))
            self._known, self.decision = stored["log_odds"], stored["decision"]

    def log_odds(
        self, pairs: Sequence[Example], make_filter: Callable[[], SafetyFilter]
    ) -> np.ndarray:
        """Returns the scores, float32 `[n]`.

        Args:
          pairs: pairs to score; equal ones are scored once.
          make_filter: called when a pair is not known, or the filter's decision is not.
        """
        keys = [pair_hash(p) for p in pairs]
        missing = {k: p for k, p in zip(keys, pairs, strict=True) if k not in self._known}
        if missing or self.decision is None:
            safety_filter = make_filter()
            scores = safety_filter.log_odds(list(missing.values()))
            self._known |= {k: float(s) for k, s in zip(missing, scores, strict=True)}
            self.decision = list(safety_filter.decision)
            self._write()
        return np.array([self._known[k] for k in keys], np.float32)

    def _write(self) -> None:
        if not self._writes:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # Written beside and renamed: a process that is killed leaves no half file behind.
        temporary = self._path.with_suffix(".tmp")
        content = {"decision": self.decision, "log_odds": self._known}
        temporary.write_text(json.dumps(content), encoding="utf-8")
        temporary.replace(self._path)
