"""Work of which most is waiting, several at once."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any


def concurrently(
    work: Callable[[Any], Any], items: Sequence[Any], threads: int
) -> Iterator[tuple[int, Any]]:
    """Yields `(number of an item, work(item))` as they end.

    Nothing is begun any more once the caller stops reading. The threads are daemons: at an
    interrupt nobody waits for what has begun.

    Args:
      work: what is done with an item.
      items: the items.
      threads: how many at once.

    Raises:
      Whatever `work` raises.
    """
    waiting, lock = enumerate(items), threading.Lock()
    ended: queue.SimpleQueue = queue.SimpleQueue()
    stopped = threading.Event()

    def run() -> None:
        while not stopped.is_set():
            with lock:
                number, item = next(waiting, (-1, None))
            if number < 0:
                return
            try:
                ended.put((number, work(item), None))
            except BaseException as error:
                ended.put((number, None, error))

    for _ in range(min(threads, len(items))):
        threading.Thread(target=run, name="judge", daemon=True).start()
    try:
        for _ in items:
            number, result, error = ended.get()
            if error is not None:
                raise error
            yield number, result
    finally:
        stopped.set()
