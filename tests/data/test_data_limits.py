"""Data files of strangers: bombs, depths, devices and links cost a line and bounded memory."""

import bz2
import gzip
import io
import json
import os
import pathlib
import subprocess
import sys
import zipfile

import pytest

from fedsafe_jax.data import limits, sources, text_files
from fedsafe_jax.data.examples import SourceError
from fedsafe_jax.validation import one_line

ROW = {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]}
LINE = json.dumps(ROW) + "\n"
SECRET = "key-of-nobody-0123"


def refused(folder, location, reader="chat"):
    with pytest.raises(SourceError) as caught:
        sources.load(f"{reader}:{location}", str(folder))
    message = one_line(caught.value)
    assert location in message and len(message) < 900 and message.isprintable(), message
    return message


def zeros(size):
    """A gigabyte of zeros as one megabyte, without holding it."""
    out = io.BytesIO()
    with gzip.GzipFile(fileobj=out, mode="wb", compresslevel=1) as packed:
        for _ in range(size // 2**20):
            packed.write(b"0" * 2**20)
    return out.getvalue()


MEASURED = """
import pathlib, resource, sys
from fedsafe_jax.data import packed_files
from fedsafe_jax.data.examples import SourceError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    packed_files.read_bytes(pathlib.Path(sys.argv[1]))
except SourceError as error:
    print(error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
@pytest.mark.parametrize("kind", ["gz", "zip"])
def test_a_gigabyte_in_a_megabyte_costs_less_than_half_of_it(tmp_path, kind):
    path = tmp_path / f"bomb.jsonl.{kind}"
    if kind == "gz":
        path.write_bytes(zeros(2**30))
    else:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            with archive.open("bomb.jsonl", "w") as member:
                for _ in range(2**10):
                    member.write(b"0" * 2**20)
    assert path.stat().st_size < 6 * 2**20
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(path)], capture_output=True, text=True, check=True
    )
    said, grown = done.stdout.splitlines()
    assert "unpacks to more than" in said and "split it into several" in said
    # A hundred times the file, or 64 MiB, and a piece; the file itself has up to 5 MiB.
    assert int(grown) * 1024 < limits.MOST_RATIO * path.stat().st_size + 2**26


def test_text_that_packs_well_is_read(tmp_path):
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(LINE.encode() * 20_000))
    assert len(sources.load("chat:x.jsonl.gz", str(tmp_path))) == 20_000


def test_a_zip_that_cannot_be_unpacked_in_pieces_is_refused(tmp_path):
    """4 KiB of bz2 may hold gigabytes, which the library would unpack at once."""
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        with zipfile.ZipFile(tmp_path / "x.zip", "w", method) as archive:
            archive.writestr("x.jsonl", LINE)
        assert "deflate" in refused(tmp_path, "x.zip")


@pytest.mark.parametrize("data", [b"", b"PK\5\6" + bytes(18), b"PK\5\6", b"PK" * 99, bytes(999)])
def test_empty_and_broken_archives_are_one_line(tmp_path, data):
    for name in ("x.zip", "x.jsonl.gz"):
        (tmp_path / name).write_bytes(data)
        refused(tmp_path, name)


def test_other_packers_and_packed_twice_are_named(tmp_path):
    (tmp_path / "x.jsonl.bz2").write_bytes(bz2.compress(LINE.encode()))
    assert ".bz2 is not unpacked" in refused(tmp_path, "x.jsonl.bz2")
    (tmp_path / "x.jsonl.gz.gz").write_bytes(gzip.compress(gzip.compress(LINE.encode())))
    assert ".gz is not unpacked" in refused(tmp_path, "x.jsonl.gz.gz")


DEEP = limits.MOST_NESTED + 1


@pytest.mark.parametrize(
    "text, said",
    [
        ("[" * 200_000, "nested too deeply"),
        ('{"a":' * DEEP + "1" + "}" * DEEP, "nested too deeply"),
        ('{"messages":' + "[" * DEEP + "]" * DEEP + "}", "nested too deeply"),
        ('{"a":' + "9" * 5000 + "}", "5000 digits"),
        ('{"a": 1e999}', "too large"),
        ('{"a": 0.' + "1" * 5000 + "}", "too long"),
        ("{" + ",".join(f'"{i}":1' for i in range(200_000)) + ',"0":1}', "occurs twice"),
    ],
)
def test_depths_digits_and_twins_are_one_line_at_once(tmp_path, text, said):
    for name in ("x.json", "x.jsonl"):
        (tmp_path / name).write_text(text)
        assert said in refused(tmp_path, name)


def test_the_deepest_value_that_is_allowed_is_read():
    text = "[" * limits.MOST_NESTED + "]" * limits.MOST_NESTED
    assert text_files.parse_json(text) is not None
    with pytest.raises(ValueError, match="nested too deeply"):
        text_files.parse_json(f"[{text}]")


@pytest.mark.parametrize(
    "limit, most, name, text, said",
    [
        ("MOST_BYTES", 50, "x.jsonl", LINE, "bytes; at most 50 are read. Split"),
        ("MOST_ROWS", 3, "x.jsonl", LINE * 4, "4 lines; at most 3 are read"),
        ("MOST_ROWS", 3, "x.txt", "\r" * 9, "9 lines; at most 3"),
        ("MOST_VALUES", 30, "x.json", "[" + "{}," * 30 + "{}]", "values; at most 30"),
        ("MOST_VALUES", 30, "x.csv", "a,b,c\n" + "1\n" * 20, "more than 30 cells"),
        ("MOST_COLUMNS", 3, "x.csv", "a,b,c,d\n1,2,3,4\n", "4 columns; at most 3"),
        ("MOST_CHARACTERS", 9, "x.csv", f"prompt\n{'a' * 30}\n", "more than 9 characters"),
        ("MOST_CHARACTERS", 9, "x.txt", "a" * 30, "30 characters; at most 9"),
        ("MOST_CHARACTERS", 9, "x.jsonl", json.dumps({"prompt": "a" * 30}), "at most 9"),
    ],
)
def test_every_limit_is_said_with_a_way_out(tmp_path, monkeypatch, limit, most, name, text, said):
    monkeypatch.setattr(limits, limit, most)
    (tmp_path / name).write_text(text)
    assert said in refused(tmp_path, name, "prompts")


def test_devices_pipes_and_folders_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    (tmp_path / "folder.jsonl").mkdir()
    for name in ("pipe.jsonl", "zero.jsonl", "folder.jsonl"):
        assert "no regular file" in refused(tmp_path, name)


HIDDEN = (
    f"{SECRET}\n",
    json.dumps({SECRET: 1}),
    json.dumps({"messages": SECRET}),
    f"{SECRET},b\n1",
)


@pytest.mark.parametrize("content", HIDDEN)
@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv", "sub/x.jsonl"])
def test_a_link_out_of_the_data_is_followed_but_never_quoted(tmp_path, content, name):
    secret = tmp_path / f"secret{pathlib.Path(name).suffix}"
    secret.write_text(content)
    folder = tmp_path / "data"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).symlink_to(secret)
    message = refused(folder, name)
    assert SECRET not in message and "link out of" in message and str(secret) in message
    # The same file under a name that the config itself gives is quoted, to be mended.
    if name != "x.csv":
        assert SECRET in refused(folder, str(secret)) or name == "x.json"


def test_links_of_an_operator_are_normal(tmp_path):
    real = tmp_path / "real"
    real.mkdir()
    (real / "x.jsonl").write_text(LINE)
    (real / "bad.jsonl").write_text('{"messages": 7}\n')
    (tmp_path / "data").symlink_to(real)
    assert sources.load("chat:x.jsonl", str(tmp_path / "data"))
    assert "found 7" in refused(tmp_path / "data", "bad.jsonl")
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "own.jsonl").symlink_to(real / "x.jsonl")
    assert sources.load("chat:own.jsonl", str(inner))
    assert sources.load(f"chat:{real / 'x.jsonl'}", "anywhere")


@pytest.mark.parametrize("name", ["../config.py", "/etc/passwd", "a/../../x.json"])
def test_packaged_locations_stay_in_the_package(name):
    with pytest.raises(SourceError, match="leads out of the packaged files"):
        sources.read_rows(f"package/{name}", "hub")


def test_a_folder_here_is_not_read_in_the_name_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    with pytest.raises(SourceError, match="a file or folder here has this name"):
        sources.read_rows("owner/name", "hub")


def test_errors_quote_a_short_piece_that_is_printable(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"messages": "\\u001b[2J' + b"a" * 99_999 + b'"}\n')
    message = refused(tmp_path, "x.jsonl")
    assert "aaaa" in message and message.count("a") < 120 and pathlib.Path(tmp_path).name in message
