"""Rows of a data set of the Hub: `hub:owner/name[config]/split@revision`."""

import os
import re
from typing import NamedTuple

from fedsafe_jax.data.examples import SourceError
from fedsafe_jax.data.text_files import one_line, shorten

PREFIX = "hub:"
FORM = f"{PREFIX}OWNER/NAME[CONFIG]/SPLIT@REVISION"
MOST_WORDS = 400  # of an error of the library, which may list every file type it knows
LOCATION = re.compile(
    r"(?P<repo>[\w.-]+/[\w.-]+|[\w.-]+)(?:\[(?P<config>[^\[\]]+)\])?(?:/(?P<split>\w[\w.-]*))?"
    r"(?:@(?P<revision>[\w./-]+))?"
)


class HubLocation(NamedTuple):
    """A split of a data set of the Hub.

    Attributes:
      repo: id of the data set, such as "databricks/databricks-dolly-15k".
      config: name of its configuration; "" for the default one.
      split: name of the split.
      revision: commit, tag or branch; "" for the newest commit.
    """

    repo: str
    config: str = ""
    split: str = "train"
    revision: str = ""


def is_on_hub(location: str, data_dir: str) -> bool:
    """Returns whether a location is one of the Hub, and no file.

    Args:
      location: location of a source.
      data_dir: folder of the files, or `hub`.
    """
    if location.startswith("package/"):
        return False
    return data_dir == "hub" or location.startswith(PREFIX)


def parse_location(location: str) -> HubLocation:
    """Reads a location of the Hub, with or without `hub:`.

    Raises:
      SourceError: it is not written as one.
    """
    match = LOCATION.fullmatch(location.removeprefix(PREFIX))
    if match is None or (location.startswith(PREFIX) and "/" not in match["repo"]):
        raise SourceError(
            f"{shorten(location)}: no data set of the Hub; write {FORM}, where all behind NAME may "
            "be left out."
        )
    given = {name: value for name, value in match.groupdict().items() if value}
    return HubLocation(**given)


def read_hub_rows(location: str) -> list[tuple[str, dict]]:
    """Loads a split of a data set of the Hub, or of the cache where the Hub is not reached.

    Args:
      location: see `parse_location`.

    Returns:
      `(place, row)` pairs, `place` to name in an error.

    Raises:
      SourceError: it cannot be loaded, or a file or folder here has its name.
    """
    import datasets

    one = parse_location(location)
    if os.path.exists(one.repo):
        # The library would read the folder of that name, whoever put it there.
        raise SourceError(
            f"Hub dataset '{one.repo}': a file or folder here has this name; give data_dir the "
            "folder that holds it, or start elsewhere."
        )
    try:
        data = datasets.load_dataset(
            one.repo,
            name=one.config or None,
            split=one.split,
            revision=one.revision or None,
        )
    except Exception as error:  # The library raises exceptions of many unrelated types.
        words = one_line(error)
        words = words if len(words) <= MOST_WORDS else f"{words[:MOST_WORDS]}..."
        hint = f" Write {FORM}." if "onfig name is missing" in words else ""
        raise SourceError(f"Hub dataset '{location}' could not be loaded: {words}{hint}") from error
    return [(f"{location} row {i}", dict(row)) for i, row in enumerate(data)]
