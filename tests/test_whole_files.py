"""Files that are written whole and kept when damaged, whatever text they hold."""

import errno
import json
import multiprocessing
import os
import resource
import sys

import hypothesis
import hypothesis.strategies as st
import pytest
from etils import epath

from fedsafe_jax import whole_files
from fedsafe_jax.runtime import run_files
from fedsafe_jax.whole_files import StorageError, WorkdirError

# Any code point, half surrogates, NUL and separators of lines among them. A high half directly
# before a low one is the character that the two stand for: JSON cannot tell them apart.
CHARACTERS = st.characters(codec=None, exclude_categories=())
TEXT = st.text(CHARACTERS).map(lambda text: text.encode("utf-16", "surrogatepass")).map(
    lambda code: code.decode("utf-16", "surrogatepass")
)  # fmt: skip
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
ROWS = st.lists(st.dictionaries(TEXT, VALUES, max_size=4), max_size=6)


@hypothesis.given(first=ROWS, second=ROWS)
@hypothesis.example(
    first=[{"text": "a\u2028b\u2029\x85\x0b\x0c\x1c\r\n\0\udfff\ud800 c"}], second=[]
)
@hypothesis.settings(deadline=None)
def test_any_rows_come_back(tmp_path_factory, first, second):
    path = epath.Path(tmp_path_factory.mktemp("rows")) / "rows.jsonl"
    run_files.replace_lines(path, lambda row: False, first)
    assert run_files.read_lines(path) == first
    run_files.replace_lines(path, lambda row: False, second)
    assert run_files.read_lines(path) == first + second
    assert path.read_bytes().count(b"\n") == len(first + second)
    path.read_text(encoding="utf-8")  # any program may read it
    assert not list(path.parent.glob("*.damaged*"))


@hypothesis.given(content=VALUES)
@hypothesis.settings(deadline=None)
def test_any_content_is_json(tmp_path_factory, content):
    path = epath.Path(tmp_path_factory.mktemp("content")) / "a" / "content.json"
    run_files.write_json(path, content)
    assert json.loads(path.read_text(encoding="utf-8")) == content == whole_files.read_json(path)


def test_numbers_that_are_not_finite_are_null(tmp_path):
    """JSON has none, and parsers other than Python's refuse a file that holds one."""
    path, lines = epath.Path(tmp_path) / "content.json", epath.Path(tmp_path) / "rows.jsonl"
    wrong = {"a": [float("nan"), (1.5, float("inf"))], "b": {"c": -float("inf")}, "d": "NaN"}
    right = {"a": [None, [1.5, None]], "b": {"c": None}, "d": "NaN"}
    run_files.write_json(path, wrong)
    run_files.replace_lines(lines, lambda row: False, [wrong, wrong])

    def refuse(constant):
        raise ValueError(constant)

    assert json.loads(path.read_bytes(), parse_constant=refuse) == right
    rows = [json.loads(row, parse_constant=refuse) for row in lines.read_bytes().splitlines()]
    assert rows == [right, right]


def test_a_config_with_infinity_is_the_same_after_it_was_written(tmp_path):
    config = {"chat_template_kwargs": {"most": float("inf")}, "seeds": (0,)}
    assert not run_files.claim_workdir(epath.Path(tmp_path), config)
    assert run_files.claim_workdir(epath.Path(tmp_path), config)


def test_a_cut_last_line_is_left_out_and_kept(tmp_path, caplog):
    path = epath.Path(tmp_path) / "rows.jsonl"
    old = b'{"a": 1}\n{"a": 2}\n{"a": "cut \xe2\x80'
    path.write_bytes(old)
    assert run_files.read_lines(path) == [{"a": 1}, {"a": 2}]
    assert "line 3 is cut off" in caplog.text and path.read_bytes() == old
    run_files.replace_lines(path, lambda row: row["a"] == 1, [{"a": 3}])
    assert run_files.read_lines(path) == [{"a": 2}, {"a": 3}]
    assert (tmp_path / "rows.jsonl.damaged").read_bytes() == old  # nothing vanishes


@pytest.mark.parametrize(
    "old", [b'{"a": 1}\n{"a"\n{"a": 2}\n', b'{"a": 1}\n{"a": \n', b"[1]\n", b'\xff\xfe\n{"a": 1}\n']
)
def test_another_damaged_line_is_an_error_that_names_it(tmp_path, old):
    path = epath.Path(tmp_path) / "rows.jsonl"
    path.write_bytes(old)
    number = next(i for i, line in enumerate(old.split(b"\n"), 1) if line != b'{"a": 1}')
    for work in (
        lambda: run_files.read_lines(path),
        lambda: run_files.replace_lines(path, lambda row: True, [{"a": 3}]),
    ):
        with pytest.raises(WorkdirError, match=f"line {number} is damaged") as error:
            work()
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["rows.jsonl"]


def test_damaged_files_are_numbered(tmp_path, caplog):
    path = tmp_path / "a.json"
    for content in ("{", "", "\0\0\0"):
        path.write_text(content)
        assert whole_files.read_json(path) is None
    names = ["a.json.damaged", "a.json.damaged2", "a.json.damaged3"]
    assert sorted(os.listdir(tmp_path)) == names
    assert [(tmp_path / name).read_text() for name in names] == ["{", "", "\0\0\0"]
    assert caplog.text.count("is damaged, and kept as") == 3
    assert whole_files.read_json(path) is None  # no file, nothing to say
    assert sorted(os.listdir(tmp_path)) == names


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = epath.Path(tmp_path) / "a.json"
    run_files.write_json(path, {"old": 1})

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError) as error:
        run_files.write_json(path, {"new": 1})
    assert str(error.value) == f"{path}: cannot be written (No space left on device)."
    assert json.loads(path.read_text()) == {"old": 1}


def test_storage_that_does_not_answer_renames_nothing(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text("{}")

    def silent(*args):
        raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))

    monkeypatch.setattr(type(epath.Path(path)), "read_bytes", silent)
    with pytest.raises(StorageError, match="cannot be read"):
        whole_files.read_json(path)
    assert os.listdir(tmp_path) == ["a.json"]


def test_files_get_the_mode_that_the_umask_asks_for(tmp_path):
    old = os.umask(0o022)
    try:
        whole_files.write(tmp_path / "a.json", b"{}")
    finally:
        os.umask(old)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o644


def test_a_link_in_place_of_a_file_gives_way_and_is_not_followed(tmp_path):
    victim, path = tmp_path / "victim", tmp_path / "run" / "config.json"
    victim.write_text("mine")
    path.parent.mkdir()
    for name in ("config.json", "config.json.tmp", ".config.json.tmp"):
        path.with_name(name).symlink_to(victim)
    (path.parent / ".config.json.aaaaaaaa.tmp").symlink_to(tmp_path)  # of a kill, it seems
    whole_files.write(path, b"{}")
    assert victim.read_text() == "mine" and not path.is_symlink()
    assert path.read_bytes() == b"{}"


def test_the_new_file_lies_where_nobody_else_can_enter_and_has_another_name_each_time(tmp_path):
    path, seen = tmp_path / "a.json", set()
    for _ in range(2):
        with whole_files.replaced(path) as new:
            assert new.parent.parent == tmp_path and new.parent.stat().st_mode & 0o777 == 0o700
            new.write_text("{}")
        seen.add(new)
    assert len(seen) == 2 and os.listdir(tmp_path) == ["a.json"]


def test_what_a_kill_left_behind_goes_with_the_next_writing(tmp_path):
    path = tmp_path / "a.json"
    for name in (".a.json.12345678.tmp", ".b.json.12345678.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name[1:7]).write_text("half of")
    whole_files.write(path, b"{}")
    assert sorted(os.listdir(tmp_path)) == [".b.json.12345678.tmp", "a.json"]


def test_content_and_names_are_on_the_disk_before_a_writing_is_done(tmp_path, monkeypatch):
    path, calls = tmp_path / "a.json", []
    sync, replace = os.fsync, os.replace

    def synced(descriptor):
        calls.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        sync(descriptor)

    def replaced(old, new):
        calls.append("rename")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    whole_files.write(path, b"{}", private=True)
    content, *rest = calls
    assert content.endswith("/a.json") and rest == ["rename", str(tmp_path)]
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("call", ["replace", "chmod"])
def test_a_failing_rename_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, call):
    path = tmp_path / "a.json"
    whole_files.write(path, b"old")

    def fail(*args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(StorageError, match="cannot be written"):
        whole_files.write(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.json"]


def _write_within(path, size, limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        whole_files.write(path, b"x" * size)
    except StorageError as error:
        sys.exit(str(error).count(str(path)) + 10)


def test_a_file_larger_than_allowed_leaves_the_old_one(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"old")
    writer = multiprocessing.get_context("forkserver").Process(
        target=_write_within, args=(path, 5000, 1000)
    )
    writer.start()
    writer.join(60)
    assert writer.exitcode == 11  # one line that names the file
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("links", [True, False])
def test_a_file_is_created_whole_and_by_one_alone(tmp_path, monkeypatch, links):
    path = tmp_path / "owner.json"
    if not links:  # as on FAT

        def refuse(*args):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

        monkeypatch.setattr(os, "link", refuse)
    assert whole_files.create(path, b"first")
    assert not whole_files.create(path, b"second")
    assert path.read_bytes() == b"first" and os.listdir(tmp_path) == ["owner.json"]
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    assert not whole_files.create(path, b"third") and not (tmp_path / "elsewhere").exists()


DEEP = b"[" * 200_000


@pytest.mark.parametrize(
    "line",
    [b"5", b"null", b"{}", b'"\xe9"', b'{"arm": "fl", "seed": 0}', DEEP]
    + [b'{"arm": "fl", "seed": "0", "round": 1}', b'{"arm": "fl", "seed": 0, "round": true}'],
)
def test_a_row_that_is_of_no_round_is_named(tmp_path, line):
    path = epath.Path(tmp_path) / "metrics.jsonl"
    whole = b'{"arm": "fl", "seed": 0, "round": 0}\n'
    path.write_bytes(whole + line + b"\n" + whole)
    fields = run_files.OF_A_ROUND
    for work in (
        lambda: run_files.read_lines(path, fields),
        lambda: run_files.replace_lines(path, lambda row: row["round"] > 0, [], fields=fields),
    ):
        with pytest.raises(WorkdirError, match="metrics.jsonl line 2 is damaged"):
            work()
    path.write_bytes(whole)
    assert len(run_files.read_lines(path, fields)) == 1


def test_json_that_is_nested_without_end_is_damaged(tmp_path):
    (tmp_path / "a.json").write_bytes(DEEP)
    assert whole_files.read_json(tmp_path / "a.json") is None
    assert (tmp_path / "a.json.damaged").is_file()
    (tmp_path / "config.json").write_bytes(DEEP)
    with pytest.raises(WorkdirError, match="config.json is damaged"):
        run_files.check_config(epath.Path(tmp_path), {"a": 1})
