"""What is known of an evaluation that has not ended, so that the same command goes on with it."""

from collections.abc import Callable, Sequence

from etils import epath

from fedsafe_jax import whole_files
from fedsafe_jax.filters.cache import content_hash
from fedsafe_jax.runtime import multihost, run_files

EVERY = 16  # replies between two writings: object storage takes few writings of one object


class Unfinished:
    """Outcomes of the tasks that have ended, and the judge's replies, in one file.

    The first process reads and writes it; in the others nothing is known.

    Args:
      path: the file, which need not exist.
      about: hash of the adapter that is evaluated, "" for none. What is known of another one is
        not taken.

    Attributes:
      outcomes: outcomes by the name of the set.
      replies: the judge's replies by a hash of what it was asked.

    Raises:
      StorageError: the storage does not give the file.
    """

    def __init__(self, path: epath.PathLike, about: str):
        self._path, self._about = epath.Path(path), about
        self.outcomes: dict[str, dict] = {}
        self.replies: dict[str, str] = {}
        stored = whole_files.read_json(self._path) if multihost.is_primary() else None
        if stored is None:
            return
        try:
            about_stored, outcomes, replies = (stored[k] for k in ("about", "outcomes", "replies"))
            if not all(isinstance(outcome, dict) for outcome in outcomes.values()):
                raise TypeError("outcomes of a task are no object")
            if not all(isinstance(reply, str) for reply in replies.values()):
                raise TypeError("a reply is no text")
        except (TypeError, KeyError, AttributeError) as error:
            whole_files.set_aside(self._path, f"it holds no outcomes and replies ({error!r:.80})")
            return
        if about_stored == about:
            self.outcomes, self.replies = outcomes, replies

    def add(self, name: str, outcome: dict) -> None:
        """Keeps the outcome of a task; raises `StorageError` where it cannot be written."""
        self.outcomes[name] = outcome
        self.write()

    def keeping(self, endpoint: Callable) -> Callable:
        """Returns an endpoint that is asked only what it has not been asked before.

        Args:
          endpoint: `messages -> text`.
        """

        def ask(messages: Sequence[dict]) -> str:
            key = content_hash(list(messages))
            if key not in self.replies:
                self.replies[key] = endpoint(messages)
                if len(self.replies) % EVERY == 0:
                    self.write()
            return self.replies[key]

        return ask

    def write(self) -> None:
        """Writes the file; raises `StorageError` where the storage does not take it."""
        content = {"about": self._about, "outcomes": self.outcomes, "replies": self.replies}
        run_files.write_json(self._path, content)
