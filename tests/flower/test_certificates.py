"""Keys of a federation: what the script makes, who may read it, and what it leaves alone."""

import shutil
import ssl
import stat
import subprocess

import pytest

pytest.importorskip("flwr")

from commands import ROOT  # noqa: E402

SCRIPT = ROOT / "launch/flower/certificates.sh"
pytestmark = pytest.mark.skipif(
    not (shutil.which("openssl") and shutil.which("ssh-keygen")), reason="no openssl or ssh-keygen"
)


def make(folder, *arguments):
    return subprocess.run(
        [SCRIPT, *arguments], cwd=folder, capture_output=True, text=True, timeout=60
    )


def openssl(*arguments):
    done = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True)
    return done.returncode, done.stdout


def test_the_servers_certificate_is_for_its_names_alone(tmp_path):
    assert make(tmp_path, "server", "keys", "fl.example.org", "10.1.2.3").returncode == 0
    keys = tmp_path / "keys"
    ca, certificate = keys / "ca.pem", keys / "server.pem"
    for flags, code in (
        (("-verify_hostname", "fl.example.org"), 0),
        (("-verify_hostname", "localhost"), 0),
        (("-verify_ip", "10.1.2.3"), 0),
        (("-verify_ip", "127.0.0.1"), 0),
        (("-verify_hostname", "example.org"), 2),
        (("-verify_ip", "10.1.2.4"), 2),
    ):
        verify = ("verify", "-CAfile", ca, "-purpose", "sslserver", *flags, certificate)
        assert openssl(*verify)[0] == code, flags
    # The certificate signs no other one.
    _, text = openssl("x509", "-in", certificate, "-noout", "-ext", "basicConstraints")
    assert "CA:FALSE" in text
    ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(
        certificate, keys / "server.key"
    )


def test_private_keys_are_the_owners_and_are_never_written_over(tmp_path):
    assert make(tmp_path, "server", "keys", "localhost").returncode == 0
    assert make(tmp_path, "node", "site").returncode == 0
    private = [tmp_path / "keys/ca.key", tmp_path / "keys/server.key", tmp_path / "site/node"]
    before = [path.read_bytes() for path in private]
    for path in private:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    for arguments in (("server", "keys", "localhost"), ("node", "site")):
        done = make(tmp_path, *arguments)
        assert done.returncode == 1 and "exists; nothing was changed" in done.stderr
    assert [path.read_bytes() for path in private] == before


def test_a_nodes_key_is_one_that_flower_takes(tmp_path):
    serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")
    assert make(tmp_path, "node", "site").returncode == 0
    private = serialization.load_ssh_private_key((tmp_path / "site/node").read_bytes(), None)
    public = serialization.load_ssh_public_key((tmp_path / "site/node.pub").read_bytes())
    assert private.public_key() == public and public.curve.name == "secp384r1"


@pytest.mark.parametrize(
    "arguments",
    [(), ("server",), ("server", "keys"), ("node",), ("node", "a", "b"), ("other", "keys")],
)
def test_wrong_use_prints_the_usage(arguments, tmp_path):
    done = make(tmp_path, *arguments)
    assert done.returncode == 2 and done.stderr.startswith("Usage: ")
