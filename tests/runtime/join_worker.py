"""A process that joins the cluster its environment describes, and says what it became."""

import os
import sys

import jax

# jax looks for TPU chips while it is imported, and without any it never asks the metadata server.
if "--tpu-vm" in sys.argv:
    os.environ.pop("TPU_SKIP_MDS_QUERY")

from fedsafe_jax.runtime import multihost  # noqa: E402

try:
    multihost.join()
except multihost.ClusterError as error:
    sys.exit(f"refused: {error}")
print("joined", jax.process_index(), jax.process_count(), multihost.is_primary())
