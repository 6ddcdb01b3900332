"""Replies of chat models, kept on disk by what was asked: a run that dies asks only the rest."""

import hashlib
import json
import threading
from collections.abc import Sequence

from etils import epath

from fedsafe_jax import whole_files


class ReplyCache:
    """A folder with a file for each reply, named by the hash of what was asked.

    The key of the endpoint is in none of them; only their owner can read them.

    Args:
      folder: the folder, created when the first reply is kept; "" to keep none.
      asked_by: what the replies depend on besides the conversation, such as the model.
    """

    def __init__(self, folder: str, asked_by: dict):
        self._folder = epath.Path(folder) if folder else None
        self._asked_by = asked_by
        self._lock, self._written = threading.Lock(), set()

    def read(self, messages: Sequence[dict]) -> str:
        """Returns the reply to a conversation; "" where none is kept.

        A file that does not hold what its name says is set aside, with a warning.

        Raises:
          StorageError: the storage does not give it.
        """
        if self._folder is None:
            return ""
        path, asked = self._place(messages)
        with self._lock:  # two threads may ask the same
            content = whole_files.read(path)
            if content is None:
                return ""
            try:
                kept = json.loads(content)
                reply = kept.pop("reply")
                good = kept == asked and isinstance(reply, str) and reply
            except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
                good = False
            if not good:
                whole_files.set_aside(path, "not a reply to what its name says")
                return ""
        return reply

    def write(self, messages: Sequence[dict], reply: str) -> None:
        """Keeps the reply to a conversation.

        Raises:
          StorageError: the storage does not take it.
        """
        if self._folder is None:
            return
        path, asked = self._place(messages)
        with self._lock:
            if path in self._written:
                return  # another thread has asked the same
            self._written.add(path)
        content = whole_files.to_json(asked | {"reply": reply}, indent=1)
        whole_files.write(path, content, private=True)

    def _place(self, messages: Sequence[dict]) -> tuple[epath.Path, dict]:
        """Returns the file of a conversation, and what stands in it beside the reply."""
        asked = json.loads(whole_files.to_json(self._asked_by | {"messages": list(messages)}))
        name = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
        # In folders by their first digits, as a folder of many files is slow.
        return self._folder / name[:2] / f"{name}.json", asked
