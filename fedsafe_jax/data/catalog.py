"""The catalog of data sets that `fedsafe fetch-data` downloads: addresses, licences, hashes.

`assets/datasets.json` holds it. A revision is a commit of the repository, so the address names the
same bytes for good; null where none could be established, and the newest one is taken. A file has
the SHA-256 of upstream's bytes, or else git's hash of them, which the commit itself vouches for;
where both are null, nothing is known of the bytes.
"""

import functools
import importlib.resources
import json
from typing import NamedTuple

from fedsafe_jax import registry

PAGES = {
    "hub": "https://huggingface.co/datasets/{repo}",
    "github": "https://github.com/{repo}",
}


class DataFile(NamedTuple):
    """One file of a data set.

    Attributes:
      to: its place in the data folder, as the configs name it.
      path: its place in the repository.
      size: bytes of upstream's file; None where unknown.
      sha256: hash of upstream's bytes; None where unknown.
      git_blob: git's SHA-1 of upstream's bytes, where no SHA-256 is known.
      stored: what is made of them, one of `fetch.contents.FORMS`.
      stored_sha256: hash of what is stored, unpacked, where that is not upstream's text.
    """

    to: str
    path: str
    size: int | None = None
    sha256: str | None = None
    git_blob: str | None = None
    stored: str = "as_it_is"
    stored_sha256: str | None = None


class DataSet(NamedTuple):
    """A data set: files of one repository at one revision.

    Attributes:
      name: what `fedsafe fetch-data` calls it.
      what: its contents.
      licence: as published.
      gate: what has to be done before the files can be downloaded; None where nothing.
      use: what it is for.
      host: "hub" (Hugging Face) or "github".
      repo: `owner/name` of the repository.
      revision: commit; None where it could not be established.
      files: its files.
    """

    name: str
    what: str
    licence: str
    gate: str | None
    use: str
    host: str
    repo: str
    revision: str | None
    files: tuple[DataFile, ...]

    @property
    def page(self) -> str:
        """Address of the repository's page."""
        return PAGES[self.host].format(repo=self.repo)


@functools.cache
def catalog() -> dict[str, DataSet]:
    """Returns all data sets by name."""
    asset = importlib.resources.files("fedsafe_jax") / "assets" / "datasets.json"
    sets = json.loads(asset.read_text(encoding="utf-8"))
    return {
        name: DataSet(name, **one | {"files": tuple(DataFile(**file) for file in one["files"])})
        for name, one in sets.items()
    }


def look_up(name: str) -> DataSet:
    """Returns a data set by its name.

    Raises:
      UnknownNameError: the catalog has no such name.
    """
    return registry.look_up(catalog(), name, "data set")


def sets_at(location: str) -> list[str]:
    """Returns the names of the data sets that have a file at a location, or in that folder."""
    return [
        name
        for name, one in catalog().items()
        if any(f.to == location or f.to.startswith(f"{location}/") for f in one.files)
    ]
