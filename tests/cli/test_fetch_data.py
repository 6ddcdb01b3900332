"""`fedsafe fetch-data` against a local server that plays the Hub and GitHub's server of files."""

import gzip
import hashlib
import importlib.util
import json
import pathlib
import re
import resource
import shutil
import zipfile

import filelock
import huggingface_hub
import pytest
from file_server import Server, serving
from huggingface_hub import constants

from fedsafe_jax.cli import fetch_data
from fedsafe_jax.cli.startup import start
from fedsafe_jax.data import catalog, sources
from fedsafe_jax.data.catalog import DataFile, DataSet
from fedsafe_jax.data.examples import SourceError
from fedsafe_jax.fetch import contents, download, folder

ROOT = pathlib.Path(__file__).parents[2]
CATALOG = catalog.catalog()
COMMIT, NEWEST = "c" * 40, "d" * 40
TEXT = b"".join(b'{"prompt": "Name a river that begins with %d."}\n' % i for i in range(2000))
SHA256 = hashlib.sha256(TEXT).hexdigest()
GIT = hashlib.sha1(b"blob %d\0" % len(TEXT) + TEXT).hexdigest()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download, "PAUSES", (0.0, 0.0))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with serving() as one:
        yield one


@pytest.fixture
def offer(server, monkeypatch):
    """Puts data sets of one file into the catalog, and their bytes on the server."""
    sets = {}
    monkeypatch.setattr(catalog, "catalog", lambda: sets)

    def put(name, host="github", revision=COMMIT, gate=None, body=TEXT, headers=None, **file):
        file = {"to": f"{name}/rows.jsonl", "path": f"some data/{name}.jsonl"} | file
        sets[name] = DataSet(
            name=name,
            what="rivers",
            licence="MIT",
            gate="gate" if gate else None,
            use="tests",
            host=host,
            repo="owner/name",
            revision=revision,
            files=(DataFile(**file),),
        )
        path = f"some%20data/{name}.jsonl"
        if host == "hub":
            for at in {revision or "main", revision or NEWEST}:
                told = {"X-Repo-Commit": revision or NEWEST} | (headers or {})
                server.replies[f"/datasets/owner/name/resolve/{at}/{path}"] = (200, told, body)
        else:
            server.replies[f"/owner/name/{revision}/{path}"] = (200, headers or {}, body)
        return sets[name]

    return put


@pytest.fixture
def run(server, tmp_path, capsys):
    """The command: its exit code (None for success), stdout and the lines of stderr."""

    def call(*arguments):
        code = None
        servers = [f"--endpoint={server.url}", f"--raw_endpoint={server.url}"]
        try:
            start("fetch-data", [*servers, f"--data_dir={tmp_path / 'data'}", *arguments])
        except SystemExit as ended:
            code = ended.code
        said = capsys.readouterr()
        return code, said.out, said.err.splitlines()

    return call


def files(tmp_path):
    data = tmp_path / "data"
    return sorted(
        p.relative_to(data).as_posix()
        for p in data.rglob("*")
        if p.is_file() and p.name != folder.LOCK
    )


def test_files_are_downloaded_once_and_recorded(server, offer, run, tmp_path):
    offer("plain", sha256=SHA256, size=len(TEXT))
    offer("packed", git_blob=GIT, to="packed/rows.json.gz", stored="gzip")
    with zipfile.ZipFile(tmp_path / "rows.zip", "w") as archive:
        archive.writestr("rows.jsonl", TEXT)
    tenth = b"".join(TEXT.splitlines(keepends=True)[::10])
    archive = (tmp_path / "rows.zip").read_bytes()
    offer(
        "tenth", body=archive, sha256=hashlib.sha256(archive).hexdigest(), to="tenth/rows.jsonl.gz",
        stored="every_10th_line", stored_sha256=hashlib.sha256(tenth).hexdigest(),
    )  # fmt: skip
    code, out, err = run("plain", "packed", "tenth")
    assert (err, code) == ([], None)
    assert f"plain: rivers; from https://github.com/owner/name at {COMMIT[:12]}" in out
    assert out.index("licence: MIT; for: tests; gate: none") < out.index(SHA256)
    data = tmp_path / "data"
    assert (data / "plain/rows.jsonl").read_bytes() == TEXT
    assert gzip.decompress((data / "packed/rows.json.gz").read_bytes()) == TEXT
    assert len(sources.read_rows("tenth/rows.jsonl.gz", str(data))) == 200
    record = json.loads((data / folder.RECORD).read_text())
    assert record["packed/rows.json.gz"]["sha256"] == SHA256
    assert record["plain/rows.jsonl"]["revision"] == COMMIT
    there = files(tmp_path)
    assert len(there) == 4  # no part is left
    server.asked.clear()
    # Another zlib packs the same text into other bytes.
    (data / "packed/rows.json.gz").write_bytes(gzip.compress(TEXT, 1))
    code, out, _ = run("--names=plain,packed", "tenth")
    assert code is None and out.count("is there already") == 3 and not server.asked
    assert files(tmp_path) == there


def test_an_interrupted_download_goes_on(server, offer, run, tmp_path):
    offer("rivers", sha256=SHA256, size=len(TEXT))
    server.cut = 1000
    code, out, (line,) = run("rivers")
    assert code == 1 and "has stopped answering" in line
    assert "3,000 bytes have come, and the same command goes on there" in line
    (part,) = files(tmp_path)
    assert part == f"rivers/rows.jsonl.{COMMIT[:12]}.part"
    with pytest.raises(SourceError, match="no such file.*`fedsafe fetch-data rivers"):
        sources.read_rows("rivers/rows.jsonl", str(tmp_path / "data"))
    server.cut = None
    server.asked.clear()
    assert run("rivers")[0] is None
    ((_, _, headers),) = server.asked
    assert headers["Range"] == "bytes=3000-" and headers["Accept-Encoding"] == "identity"
    assert (tmp_path / "data/rivers/rows.jsonl").read_bytes() == TEXT
    assert files(tmp_path) == [folder.RECORD, "rivers/rows.jsonl"]


@pytest.mark.parametrize("left", [TEXT[:500], TEXT, TEXT + b"more", b"of another file"])
@pytest.mark.parametrize("ranges", [True, False])
def test_whatever_was_left_the_file_is_right(server, offer, run, tmp_path, left, ranges):
    offer("rivers", git_blob=GIT)
    server.ranges = ranges
    part = tmp_path / f"data/rivers/rows.jsonl.{COMMIT[:12]}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(left)
    assert run("rivers")[0] is None
    assert (part.parent / "rows.jsonl").read_bytes() == TEXT and not part.exists()


def test_another_file_is_refused_and_not_kept(server, offer, run, tmp_path):
    offer("hashed", sha256="0" * 64)
    offer("sized", sha256=SHA256, size=7)
    offer("git", git_blob="0" * 40)
    offer("page", sha256=SHA256, headers={"Content-Type": "text/html; charset=utf-8"})
    for name, words in (
        ("hashed", f"sha256 {SHA256}, expected {'0' * 64}"),
        ("sized", f"has {len(TEXT):,} bytes, the catalog 7"),
        ("git", f"git {GIT}, expected {'0' * 40}"),
        ("page", "a web page or packed text"),
    ):
        code, out, (line,) = run(name)
        assert code == 2 and words in line and line.startswith(f"error: {name}: http")
        assert not (tmp_path / f"data/{name}/rows.jsonl").exists()
    assert files(tmp_path) == []


def test_a_half_is_never_taken_for_the_whole(server, offer, run, tmp_path):
    """A server that says no length, and hangs up: only a known size or hash tells."""
    server.lengths, server.cut = False, 1000
    offer("sized", sha256=SHA256, size=len(TEXT))
    offer("unknown", host="hub")
    code, _, (line,) = run("sized")
    assert code == 1 and "has stopped answering (it has hung up); 3,000 bytes have come" in line
    code, _, (line,) = run("unknown")
    assert code == 2 and "does not say how long the file is" in line
    server.cut = None
    assert run("sized")[0] is None
    assert files(tmp_path) == [folder.RECORD, "sized/rows.jsonl"]


def test_a_damaged_record_is_set_aside(offer, run, tmp_path):
    offer("rivers", sha256=SHA256)
    offer("lakes", sha256=SHA256)
    assert run("rivers")[0] is None
    (tmp_path / "data" / folder.RECORD).write_text('["no object"]')
    assert run("rivers", "lakes")[0] is None
    assert list(json.loads((tmp_path / "data" / folder.RECORD).read_text())) == ["lakes/rows.jsonl"]
    assert (tmp_path / "data" / f"{folder.RECORD}.damaged").is_file()


def test_what_is_in_its_place_stays(server, offer, run, tmp_path):
    offer("rivers", sha256=SHA256)
    offer("packed", sha256=SHA256, to="packed/rows.jsonl.gz", stored="gzip")
    offer("folder", sha256=SHA256)
    mine, packed = (tmp_path / "data" / n for n in ("rivers/rows.jsonl", "packed/rows.jsonl.gz"))
    for path in (mine, packed):
        path.parent.mkdir(parents=True)
        path.write_text("mine")
    (tmp_path / "data/folder/rows.jsonl").mkdir(parents=True)
    for name, words in (
        ("rivers", "is there, and is another file"),
        ("packed", "damaged, or no gzip file"),
        ("folder", "is no regular file"),
    ):
        code, _, (line,) = run(name)
        assert code == 2 and words in line and not server.asked
    assert mine.read_text() == packed.read_text() == "mine"


def test_gated_without_a_token_and_with_one(server, offer, run, tmp_path, monkeypatch):
    one = offer("gated", host="hub", gate=True, sha256=SHA256)
    code, _, (line,) = run("gated")
    assert code == 2 and f"{one.page} is gated, and no token is set: gate." in line
    assert not server.asked
    ((path, (_, told, body)),) = server.replies.items()
    # As the Hub does, the file itself comes from elsewhere, which has no business with the token.
    with serving() as elsewhere:
        elsewhere.replies["/blob"] = (200, {}, body)
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
        server.replies[path] = (403, {"X-Error-Code": "GatedRepo"}, b"ask first")
        code, _, (line,) = run("gated")
        assert code == 2 and "the token's account has no access: gate." in line
        server.replies[path] = (302, told | {"Location": f"{elsewhere.url}/blob"}, b"")
        assert run("gated")[0] is None
    assert server.asked[-1][2]["authorization"] == "Bearer hf_secret"
    ((_, _, headers),) = elsewhere.asked
    assert "authorization" not in {name.lower() for name in headers}
    offer("rivers", sha256=SHA256)
    assert run("rivers")[0] is None
    assert "authorization" not in {name.lower() for name in server.asked[-1][2]}  # of GitHub


def test_what_is_gone_or_refused_is_one_line(server, offer, run, tmp_path):
    offer("hub", host="hub", sha256=SHA256)
    offer("github", sha256=SHA256)
    hub, github = server.replies
    for name, path, reply, words in (
        ("hub", hub, (404, {"X-Error-Code": "RevisionNotFound"}), f"revision {COMMIT} is gone"),
        ("hub", hub, (404, {"X-Error-Code": "EntryNotFound"}), "has no some data/hub.jsonl at"),
        ("hub", hub, (401, {"X-Error-Code": "RepoNotFound"}), "gone, private, or not open"),
        ("hub", hub, (401, {"X-Error-Code": "GatedRepo"}), "is gated, and no token is set"),
        ("github", github, (404, {}), f"at revision {COMMIT}: one of them is gone (HTTP 404)"),
        ("github", github, (451, {}), "answers HTTP 451"),
        ("github", github, (503, {}), "has stopped answering (HTTP 503)"),
    ):
        server.replies[path] = (*reply, b"no")
        code, _, (line,) = run(name)
        assert code == (1 if reply[0] == 503 else 2) and words in line
        assert line.startswith(f"error: {name}: http") and files(tmp_path) == []


def test_unknown_names_and_flags_are_one_line(offer, run, server, capsys):
    offer("rivers", sha256=SHA256)
    code, _, (line,) = run("rivers", "riverz")
    assert code == 2 and "'riverz' is not one of rivers. Did you mean 'rivers'?" in line
    assert not server.asked
    code, _, (line,) = run("rivers", "--raw_endpoint=ftp:there")
    assert code == 2 and "expected an address" in line
    with pytest.raises(SystemExit):
        start("fetch-data", ["rivers"])
    assert "--data_dir: missing" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        start("fetch-data", ["rivers", "--data_dir=gs://bucket/data"])
    assert "expected a local folder" in capsys.readouterr().err


def test_without_a_known_hash_the_record_keeps_it(server, offer, run, tmp_path):
    offer("new", host="hub", revision=None, headers={"ETag": f'"{GIT}"'})
    code, out, err = run("new")
    assert (err, code) == ([], None)
    assert f"sha256 {SHA256} (none in the catalog, kept in {folder.RECORD})" in out
    assert [method for method, _, _ in server.asked] == ["HEAD", "GET"]
    assert f"/{NEWEST}/" in server.asked[1][1]  # the commit, not the branch that may move
    record = json.loads((tmp_path / "data" / folder.RECORD).read_text())["new/rows.jsonl"]
    assert (record["revision"], record["sha256"]) == (NEWEST, SHA256)
    assert "is there already" in run("new")[1]
    (tmp_path / "data/new/rows.jsonl").write_text("changed")
    code, _, (line,) = run("new")
    assert code == 2 and f"expected {SHA256}" in line
    # The server's own word on what it serves is held against it.
    offer("other", host="hub", revision=None, headers={"X-Linked-ETag": f'"{"0" * 64}"'})
    code, _, (line,) = run("other")
    assert code == 2 and f"sha256 {SHA256}, expected {'0' * 64}" in line
    offer("silent", host="hub", revision=None, headers={"X-Repo-Commit": ""})
    code, _, (line,) = run("silent")
    assert code == 2 and "does not say of which commit it is" in line


def test_no_network_and_no_room(server, offer, run, tmp_path, monkeypatch):
    offer("rivers", sha256=SHA256)
    closed = Server()
    closed.server_close()
    code, _, (line,) = run("rivers", f"--raw_endpoint={closed.url}")
    assert code == 1 and "cannot be reached (" in line
    assert "Is there a network? --raw_endpoint names a mirror." in line
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
        code, _, (line,) = run("rivers")
        assert code == 1 and "the disk has room for 10" in line
    assert files(tmp_path) == []
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))  # the kernel takes no more, in a file
    try:
        code, _, (line,) = run("rivers")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 1 and ".part: cannot be written (File too large)" in line
    assert run("rivers")[0] is None


def test_one_command_at_a_time(offer, run, tmp_path):
    offer("rivers", sha256=SHA256)
    (tmp_path / "data").mkdir()
    with filelock.FileLock(tmp_path / "data" / folder.LOCK):
        code, _, (line,) = run("rivers")
    assert code == 1 and "another command is downloading into it" in line


def test_the_hub_is_not_asked_when_it_is_off(server, offer, run, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    offer("hub", host="hub", sha256=SHA256)
    code, _, (line,) = run("hub")
    assert code == 2 and "HF_HUB_OFFLINE is set" in line and not server.asked


def test_the_list_and_the_environments_endpoint(server, offer, tmp_path, capsys, monkeypatch):
    offer("rivers", host="hub", sha256=SHA256)
    for flags in ([], ["--list"]):
        start("fetch-data", flags)
        assert capsys.readouterr().out.split() == ["rivers", "rivers", "(MIT)."]
    monkeypatch.setenv("HF_ENDPOINT", server.url + "/")
    start("fetch-data", ["rivers", f"--data_dir={tmp_path}"])
    assert (tmp_path / "rivers/rows.jsonl").read_bytes() == TEXT


def test_the_catalog_is_sound():
    places = [file.to for one in CATALOG.values() for file in one.files]
    assert len(places) == len(set(places))
    for one in CATALOG.values():
        assert one.host in catalog.PAGES and re.fullmatch(r"[\w.-]+/[\w.-]+", one.repo)
        assert one.revision is None or re.fullmatch(r"[0-9a-f]{40}", one.revision)
        assert one.revision or one.host == "hub"  # GitHub's files are asked for by commit
        for file in one.files:
            path = pathlib.PurePosixPath(file.to)
            assert not path.is_absolute() and ".." not in path.parts and len(path.parts) > 1
            assert file.stored in contents.FORMS
            assert re.fullmatch(r"[0-9a-f]{64}", file.sha256 or "0" * 64)
            assert re.fullmatch(r"[0-9a-f]{40}", file.git_blob or "0" * 40)
            assert one.host == "hub" or file.sha256 or file.git_blob
            assert bool(file.stored_sha256) == (file.stored == "every_10th_line")


def hash_of(file):
    if file.sha256:
        return f"`{file.sha256[:12]}`"
    return f"git `{file.git_blob[:12]}`" if file.git_blob else "none"


def row(one):
    revision = f"`{one.revision[:12]}`" if one.revision else "newest"
    listed = "<br>".join(f"`{file.to}` {hash_of(file)}" for file in one.files)
    what = one.what + (f". **Gated**: {one.gate}" if one.gate else "")
    cells = (f"`{one.name}`", what, f"[{one.repo}]({one.page}) {revision}", one.licence, one.use)
    return "| " + " | ".join((*cells, listed)) + " |"


def test_the_documented_table_is_the_catalog():
    table = (ROOT / "docs/datasets.md").read_text().partition("|---|")[2].partition("\n\n")[0]
    assert table.splitlines()[1:] == [row(one) for one in CATALOG.values()]


@pytest.mark.parametrize(
    "config", ["lab", "smollm", "paper", "align:public", "filter_minilm", "pretrain_demo"]
)
def test_the_files_of_every_config_are_in_the_catalog(config):
    name, _, argument = config.partition(":")
    path = ROOT / f"configs/{name}.py"
    spec = importlib.util.spec_from_file_location("config_of_catalog", path)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    settings = module.get_config(argument) if argument else module.get_config()
    named = [re.search(r"(\w+/[\w./-]+\.\w+)", t) for t in fetch_data._texts(settings.to_dict())]
    wanted = {m[1] for m in named if m and not re.match("package/|configs/|assets/|llama/", m[1])}
    names = fetch_data._names_of(f"{path}:{argument}" if argument else str(path))
    given = {file.to for name in names for file in CATALOG[name].files}
    assert wanted and wanted <= given
