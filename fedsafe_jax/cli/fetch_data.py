"""Downloads public data sets into a folder, in the places that configs and evaluations name.

    fedsafe fetch-data gsm8k dolly_sample --data_dir=DATA
    fedsafe fetch-data --for=configs/lab.py --data_dir=DATA
    fedsafe fetch-data --list

Licence and gate of each set are printed first; whoever downloads it accepts them. Files come from
the Hub or from GitHub by commit, and are compared with their hashes; the same command goes on after
an interruption, and leaves alone what is there. DATA/fetched.json says where each file came from.
"""

import os
import pathlib
import re
import sys
import textwrap
from collections.abc import Iterator

from absl import flags

from fedsafe_jax.cli.command import Command, UsageError
from fedsafe_jax.data import catalog
from fedsafe_jax.data.catalog import DataSet

HUB_ENDPOINT = "https://huggingface.co"
RAW_ENDPOINT = "https://raw.githubusercontent.com"


def define_flags(values: flags.FlagValues) -> None:
    """Defines the command's flags."""
    here = {"flag_values": values}
    text = flags.DEFINE_string
    flags.DEFINE_list("names", None, "Data sets; the same as names without a flag.", **here)
    text("data_dir", "", "Folder of the data, made if missing.", **here)
    text("for", "", "Config file: the data sets that it reads.", **here)
    text("endpoint", "", "The Hub, or a mirror; else HF_ENDPOINT, else the Hub itself.", **here)
    text("raw_endpoint", RAW_ENDPOINT, "Server of GitHub's files, or a mirror.", **here)
    flags.DEFINE_bool("list", False, "Lists the data sets, and downloads nothing.", **here)


def main(values: flags.FlagValues) -> None:
    """Lists the data sets, or downloads those that are named."""
    names = list(dict.fromkeys([*(values.names or ()), *_names_of(values["for"].value)]))
    sets = [catalog.look_up(name) for name in names]
    if values.list or not sets:
        print("\n".join(map(_listed, sets or catalog.catalog().values())))
        return
    if not values.data_dir:
        raise UsageError("--data_dir: missing; name the folder to download to.")
    if "://" in values.data_dir:
        raise UsageError(f"--data_dir={values.data_dir}: expected a local folder.")
    hub = values.endpoint or os.environ.get("HF_ENDPOINT") or HUB_ENDPOINT
    for flag, url in (("endpoint", hub), ("raw_endpoint", values.raw_endpoint)):
        if not re.match(r"https?://[^/]", url):
            raise UsageError(f"--{flag}={url}: expected an address, https://...")

    import huggingface_hub

    from fedsafe_jax.fetch import download, folder

    token = huggingface_hub.get_token()
    servers = folder.Servers(hub.rstrip("/"), values.raw_endpoint.rstrip("/"), token)
    folder.check_gates(sets, servers)
    folder.check_offline(sets)
    data_dir = pathlib.Path(values.data_dir)
    with folder.locked(data_dir), download.client() as http:
        for one in sets:
            print(_terms(one), flush=True)
            report = folder.Reporter(_say, _moved)
            folder.fetch(http, one, data_dir, servers=servers, report=report)


def _names_of(config: str) -> list[str]:
    """The data sets that a config file reads, in its order."""
    if not config:
        return []
    from fedsafe_jax.cli import config_file
    from fedsafe_jax.evals.tasks import TASKS

    names: dict[str, None] = {}
    for text in _texts(config_file.read(config).to_dict()):
        source = TASKS[text].source if text in TASKS else text
        location = re.sub(r"^(\w+=)?(\w+:)?|#.*$", "", source)
        names |= dict.fromkeys(catalog.sets_at(location) if "/" in location else [])
    if not names:
        raise UsageError(f"--for={config}: reads no data set of the catalog.")
    return list(names)


def _texts(value: object) -> Iterator[str]:
    """All texts within a config's values."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _texts(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _texts(one)


def _listed(one: DataSet) -> str:
    gated = " Gated." if one.gate else ""
    return textwrap.fill(
        f"{one.name:24}{one.what} ({one.licence}).{gated}", 100, subsequent_indent=" " * 24
    )


def _terms(one: DataSet) -> str:
    at = f"at {one.revision[:12]}" if one.revision else "at its newest revision (none is pinned)"
    return (
        f"{one.name}: {one.what}; from {one.page} {at}\n"
        f"  licence: {one.licence}; for: {one.use}; gate: {one.gate or 'none'}"
    )


def _say(line: str) -> None:
    print(f"  {line}", flush=True)


def _moved(name: str, there: int, total: int | None) -> None:
    """Shows on a terminal how far a download is."""
    if sys.stderr.isatty():
        share = f"{100 * there // total}%" if total else f"{there:,} bytes"
        end = "\r\033[K" if there == total else ""
        print(f"\r  {name}: {share}\033[K", end=end, file=sys.stderr, flush=True)


COMMAND = Command(define_flags, main, positional="names")
