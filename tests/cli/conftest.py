"""A run that kept everything, for the commands that read a workdir."""

import pytest
from kept_run import config_of

from fedsafe_jax import experiment


@pytest.fixture(scope="session")
def kept(tmp_path_factory):
    """Workdir of a run that kept everything, in chunks of one client; nobody writes to it."""
    workdir = tmp_path_factory.mktemp("kept")
    config = config_of(checkpoint_keep=0, keep_updates=True, chunk_clients=1)
    experiment.run(config, str(workdir))
    return workdir
