"""Scores of pairs kept under the workdir, by the content of filter and pair."""

import hashlib
import json
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
from etils import epath

from fedsafe_jax.data.examples import Example


def content_hash(*parts) -> str:
    """Of JSON-like content."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=list)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def pair_hash(pair: Example) -> str:
    """Of what a filter reads of a pair."""
    return content_hash(pair.prompt, pair.response)


def folder_hash(folder, patterns: Sequence[str] = ("*",)) -> str:
    """Of the files right in a folder that match: a filter that was trained again scores anew."""
    found = hashlib.sha256()
    matching = {p for pattern in patterns for p in pathlib.Path(folder).glob(pattern)}
    for path in sorted(p for p in matching if p.is_file()):
        with path.open("rb") as file:
            found.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}".encode())
    return found.hexdigest()[:32]


class ScoreCache:
    """Raw log-odds of one filter.

    Args:
      folder: of all caches; one file a filter.
      fingerprint: of the filter: its settings, seed and training pairs.
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

    def log_odds(self, pairs: Sequence[Example], make_filter: Callable) -> np.ndarray:
        """Scores, float32 `[n]`.

        Args:
          pairs: to score; equal ones are scored once.
          make_filter: `() -> filter`, called when a pair is not known, or no decision is.
        """
        keys = [pair_hash(p) for p in pairs]
        missing = {k: p for k, p in zip(keys, pairs, strict=True) if k not in self._known}
        if missing or self.decision is None:
            found = make_filter()
            scores = found.log_odds(list(missing.values()))
            self._known |= {k: float(s) for k, s in zip(missing, scores, strict=True)}
            self.decision = list(found.decision)
            self._write()
        return np.array([self._known[k] for k in keys], np.float32)

    def _write(self) -> None:
        if not self._writes:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(".tmp")
        content = {"decision": self.decision, "log_odds": self._known}
        temporary.write_text(json.dumps(content), encoding="utf-8")
        temporary.replace(self._path)
