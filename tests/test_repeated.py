"""Rows of docs/evidence.md, repeated from an empty folder by the commands that stand there.

The files are public, and none of them is in the repository: FEDSAFE_PUBLIC_DATA names a folder that
has them, as `fedsafe fetch-data` leaves it, and a local server plays their upstream.
"""

import gzip
import os
import pathlib
import re
import shlex
import subprocess
import sys
import urllib.parse

import pytest
from file_server import serving

from fedsafe_jax.data import catalog

ROOT = pathlib.Path(__file__).parents[1]
DATA = os.environ.get("FEDSAFE_PUBLIC_DATA", "")
MODELS = {"Llama 2": "llama2", "Mistral": "mistral"}


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.skipif(not DATA, reason="FEDSAFE_PUBLIC_DATA names no folder")
def test_judges_against_human_labels(tmp_path):
    text = (ROOT / "docs/evidence.md").read_text().partition("\n## Judges\n")[2]
    fetch = re.search(r"`fedsafe (fetch-data [^`]*)`", text)[1]
    measure = re.search(r"`python (benchmarks/judges.py --data_dir=DATA)", text)[1]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1"}

    def run(*command):
        done = subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    with serving() as server:
        for one in catalog.catalog().values():
            for file in one.files:
                path = pathlib.Path(DATA, file.to)
                if path.is_file():
                    body = path.read_bytes()
                    body = gzip.decompress(body) if file.stored == "gzip" else body
                    url = f"/{one.repo}/{one.revision}/{urllib.parse.quote(file.path)}"
                    server.replies[url] = (200, {}, body)
        run("-m", "fedsafe_jax", *shlex.split(fetch), f"--raw_endpoint={server.url}")
    script, *flags = shlex.split(measure)
    printed = [cells(line) for line in run(str(ROOT / script), *flags) if line.startswith("| ")]
    rows = [cells(line) for line in text.splitlines() if line.startswith("| ")]
    documented = [row for row in rows if row[1] in MODELS][: len(printed) - 1]
    assert len(documented) == 8
    assert [row[1:] for row in printed[1:]] == [[MODELS[m], *r] for _, m, *r in documented]
