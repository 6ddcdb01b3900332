"""Lists in the documentation are those of the code."""

import pathlib
import re

from fedsafe_jax.cli.command import COMMANDS
from fedsafe_jax.data.readers import READERS
from fedsafe_jax.pipeline.evaluation import tasks

DOCS = pathlib.Path(__file__).parents[1] / "docs"
ROOT = DOCS.parent


def test_the_readers_are_those_that_exist():
    listed = re.search(r"Readers: (.*?);", (DOCS / "data.md").read_text(), re.DOTALL)[1]
    assert re.split(r",\s+", listed) == list(READERS)


def test_the_tasks_are_those_that_exist():
    table = (DOCS / "data.md").read_text().partition("| task |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)`", table, re.MULTILINE) == list(tasks())


def test_every_command_is_in_the_readme():
    text = (ROOT / "README.md").read_text()
    for command in COMMANDS:
        assert re.search(rf"`fedsafe {command}[ `]", text), command


def test_the_architecture_names_what_exists_once_in_a_walk():
    text = (DOCS / "architecture.md").read_text()
    walks = text.partition("## Walks")[2].partition("## Decisions")[0].split("\n\n")
    for walk in walks:
        files = re.findall(r"`([a-z_]+/[a-z_/]*(?:\.py)?)`", walk)
        assert len(files) == len(set(files))
        for file in files:
            assert (ROOT / "fedsafe_jax" / file).exists(), file
    registries = text.partition("## Registries")[2].partition("## Walks")[0]
    for name in re.findall(r"`((?:[a-z_]+\.)+[A-Z_]+)`", registries):
        module, _, attribute = name.rpartition(".")
        package = __import__(f"fedsafe_jax.{module}", fromlist=[attribute])
        assert isinstance(getattr(package, attribute), dict), name
