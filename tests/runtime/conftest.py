"""A bucket in memory, for tests of what a run writes on Google Cloud Storage."""

from collections.abc import Iterator

import fsspec
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem


class Bucket(MemoryFileSystem):
    """Stands for Google Cloud Storage.

    One class for all test files: epath keeps the first file system it gets for `gs://`.
    """

    protocol = ("gcs", "gs")
    store: dict = {}
    pseudo_dirs = [""]


@pytest.fixture
def bucket(monkeypatch) -> Iterator[epath.Path]:
    """An empty bucket."""
    fsspec.register_implementation("gcs", Bucket, clobber=True)
    monkeypatch.setattr(Bucket, "store", {})
    yield epath.Path("gs://bucket")
    fsspec.register_implementation("gcs", "gcsfs.GCSFileSystem", clobber=True)
