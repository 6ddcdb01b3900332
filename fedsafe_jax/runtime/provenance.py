"""What made a run: package, commit, command and time, for `results.json` and the report."""

import datetime
import importlib.metadata
import pathlib
import platform
import shlex
import subprocess
import sys

PACKAGE = pathlib.Path(__file__).parents[1]


def describe() -> dict[str, str]:
    """Returns what this process is: `fedsafe_jax`, `commit`, `python`, `command` and `date`.

    The date is the present time in UTC. The commit is "" where the package does not lie in a
    checkout of its own, and ends with "-dirty" where files differ from it.
    """
    return {
        "fedsafe_jax": importlib.metadata.version("fedsafe_jax"),
        "commit": commit(PACKAGE),
        "python": platform.python_version(),
        "command": shlex.join([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def commit(package: pathlib.Path) -> str:
    """Returns the commit of the checkout whose top folder holds the package; "" without one.

    A package that is installed below some other project's checkout is not of that commit.

    Args:
      package: folder of the package.
    """

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(package), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        )
        return done.stdout.strip()

    try:
        if pathlib.Path(git("rev-parse", "--show-toplevel")) != package.parent.resolve():
            return ""
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):  # no git, or no checkout
        return ""
