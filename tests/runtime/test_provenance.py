"""What a run says about what made it."""

import datetime
import subprocess
import sys

from fedsafe_jax.runtime import fingerprints, provenance


def git(folder, *arguments):
    who = ["-c", "user.name=A", "-c", "user.email=a@b.c"]
    done = subprocess.run(
        ["git", *who, *arguments], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_the_commit_is_that_of_the_packages_own_checkout(tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    (package / "code.py").write_text("1\n")
    assert provenance.commit(package) == ""  # no checkout
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "One")
    git(tmp_path, "tag", "v1")  # a commit is named by itself
    head = git(tmp_path, "rev-parse", "HEAD")
    assert provenance.commit(package) == head
    (package / "code.py").write_text("2\n")
    assert provenance.commit(package) == f"{head}-dirty"
    inside = package / "site-packages" / "package"
    inside.mkdir(parents=True)
    assert provenance.commit(inside) == ""  # installed below the checkout of another project


def test_without_git_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.commit(provenance.PACKAGE) == ""


def test_the_command_can_be_given_again(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/fedsafe", "run", "--config.arms=('fl','base')"])
    made = provenance.describe()
    assert made["command"] == """fedsafe run '--config.arms=('"'"'fl'"'"','"'"'base'"'"')'"""
    date = datetime.datetime.fromisoformat(made["date"])
    assert date.utcoffset() == datetime.timedelta(0)
    assert abs(datetime.datetime.now(datetime.UTC) - date) < datetime.timedelta(minutes=5)


def test_hashes_are_those_that_were_checked(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("a")
    assert fingerprints.hashes(tmp_path) == {}
    fingerprints.check(tmp_path, {"data/a.txt": file})
    (found,) = fingerprints.hashes(tmp_path).items()
    # sha256 of "a", as sha256sum prints it
    assert found == (
        "data/a.txt", "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"
    )  # fmt: skip
