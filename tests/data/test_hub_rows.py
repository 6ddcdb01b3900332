"""Data sets of the Hub beside local files, from a local server that plays the Hub."""

import json
import os
import re
import subprocess
import sys

import pytest
from file_server import serving

from fedsafe_jax.config import default_config
from fedsafe_jax.data import sources
from fedsafe_jax.data.examples import SourceError
from fedsafe_jax.data.hub_rows import HubLocation, is_on_hub, parse_location, read_hub_rows
from fedsafe_jax.pipeline.dry_run import _held

COMMIT = "a" * 40
FILES = {
    "README.md": b"---\nconfigs:\n"
    b"- config_name: short\n  data_files:\n  - split: train\n    path: data/short.jsonl\n"
    b"- config_name: long\n  data_files:\n  - split: test\n    path: data/long.jsonl\n---\n",
    "data/short.jsonl": b'{"prompt": "A river?"}\n',
    "data/long.jsonl": b'{"prompt": "A long river?"}\n{"prompt": "A lake?"}\n',
}
JSON = {"Content-Type": "application/json"}


class Hub(dict):
    """The replies of a Hub with one data set, owner/rivers, at one commit."""

    def get(self, path, default):
        path = path.partition("?")[0].removeprefix("/api").replace("/main", f"/{COMMIT}")
        entry = {"size": 9, "oid": "b" * 40}
        if match := re.fullmatch(rf"/datasets/owner/rivers/resolve/{COMMIT}/(.*)", path):
            if (body := FILES.get(match[1])) is None:
                return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b""
            return 200, {"X-Repo-Commit": COMMIT, "ETag": f'"{len(match[1]):040}"'}, body
        if match := re.fullmatch(rf"/datasets/owner/rivers/tree/{COMMIT}(?:/(.*))?", path):
            under = f"{match[1]}/" if match[1] else ""
            listed = [entry | {"type": "file", "path": n} for n in FILES if n.startswith(under)]
            return 200, JSON, json.dumps(listed).encode()
        if re.fullmatch(rf"/datasets/owner/rivers(?:/revision/{COMMIT})?", path):
            siblings = [{"rfilename": name} for name in FILES]
            info = {"id": "owner/rivers", "sha": COMMIT, "private": False, "siblings": siblings}
            return 200, JSON, json.dumps(info).encode()
        return default


READ = """
import sys
from fedsafe_jax.data import sources
from fedsafe_jax.data.examples import SourceError
for source in sys.argv[2:]:
    try:
        print([e.messages[0][1] for e in sources.load(source, sys.argv[1])])
    except SourceError as error:
        print("error:", error)
"""


def read(folder, *names, **changes):
    environment = (
        os.environ | {"HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1"} | changes
    )
    done = subprocess.run(
        [sys.executable, "-c", READ, str(folder), *names],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_hub_and_files_are_read_beside_each_other_and_again_offline(tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"prompt": "A hill?"}\n')
    pinned = f"prompts:hub:owner/rivers[long]/test@{COMMIT}"
    with serving() as server:
        server.replies = Hub()
        there = {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0"}
        lines = read(
            tmp_path,
            "prompts:mine.jsonl",
            pinned,
            "prompts:hub:owner/rivers[short]",
            "prompts:hub:owner/rivers",
            f"prompts:hub:owner/rivers[long]/test@{'d' * 40}",
            "prompts:hub:owner/rivers[long]/dev",
            **there,
        )
    assert lines[:3] == ["['A hill?']", "['A long river?', 'A lake?']", "['A river?']"]
    assert "Config name is missing" in lines[3] and "OWNER/NAME[CONFIG]/SPLIT" in lines[3]
    assert f"could not be loaded: Revision '{'d' * 40}' doesn't exist" in lines[4]
    assert "'hub:owner/rivers[long]/dev' could not be loaded" in lines[5] and len(lines) == 6
    offline = read(tmp_path, pinned, "prompts:hub:owner/lakes", HF_HUB_OFFLINE="1")
    assert offline[0] == lines[1]
    assert "'hub:owner/lakes' could not be loaded" in offline[1] and len(offline) == 2


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("hub:a/b", HubLocation("a/b")),
        ("hub:a/b[c d]/test@v1.0", HubLocation("a/b", "c d", "test", "v1.0")),
        ("hub:a/b@refs/pr/1", HubLocation("a/b", revision="refs/pr/1")),
        ("a/b/validation", HubLocation("a/b", split="validation")),
        ("squad", HubLocation("squad")),
    ],
)
def test_a_location_names_config_split_and_revision(location, expected):
    assert parse_location(location) == expected


@pytest.mark.parametrize("location", ["hub:", "hub:squad", "hub:a/b[]", "hub:a/b/c/d", "hub:a/b@"])
def test_a_location_that_is_none_is_told_before_anything_is_read(location):
    with pytest.raises(SourceError, match="write hub:OWNER/NAME"):
        sources.parse_source(f"prompts:{location}")


def test_what_is_a_file_and_what_is_on_the_hub():
    assert is_on_hub("hub:a/b", "/data") and is_on_hub("a/b", "hub")
    assert not is_on_hub("a/b", "/data") and not is_on_hub("package/x.jsonl", "hub")


def test_a_folder_of_the_name_is_not_read_instead(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    with pytest.raises(SourceError, match="a file or folder here has this name"):
        read_hub_rows("hub:a/b[c]/test")


def test_a_dry_run_asks_the_hub_nothing():
    config = default_config()
    config.safe_sources = ("chat:package/clients_safe.jsonl", "dolly:hub:owner/dolly")
    assert "the data are read from the Hub when it runs" in _held(config)
