"""One of two processes: the first waits for the second, which dies or does not come."""

import os
import signal
import sys
import time

from fedsafe_jax.runtime import multihost

case = sys.argv[1]
if case == "killed":
    multihost.LOST_AFTER_S = 10
else:
    multihost.BARRIER_TIMEOUT_S = 3
multihost.join()
multihost.barrier("begin", 60)
print("began", flush=True)
started = time.monotonic()
if not multihost.is_primary():
    if case == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
    os._exit(0)
try:
    multihost.barrier("round")
except multihost.AbsentError as error:
    print(f"error: {error}")
    print(f"{time.monotonic() - started:.0f} s", flush=True)
    os._exit(1)
