"""A federation over TLS with node authentication, and who tries to get in.

Its commands are those of docs/sites.md. It needs nginx, which stands in front of the SuperLink.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import time

import numpy as np
import pytest

pytest.importorskip("flwr")
if not (shutil.which("nginx") or os.path.exists("/usr/sbin/nginx")):
    pytest.skip("nginx is not installed", allow_module_level=True)

from commands import QUICK, rows  # noqa: E402
from cryptography.hazmat.primitives.serialization import load_ssh_private_key  # noqa: E402
from flwr.proto import control_pb2, fleet_pb2  # noqa: E402
from flwr.proto.node_pb2 import Node  # noqa: E402
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor  # noqa: E402
from test_flower import PROGRAMS, ROOT, exported, free_ports, node_config, run_config, wait_for  # noqa: E402

httpx = pytest.importorskip("httpx")


def documented():
    """Returns the commands of docs/sites.md by their first words, as they are typed."""
    text = (ROOT / "docs/sites.md").read_text().partition("## Start")[2].partition("\n## ")[0]
    lines = re.sub(r"\\\n +", "", "\n".join(re.findall(r"^    (.*)$", text, re.M))).splitlines()
    return [line for line in lines if line.startswith(STARTS)]


STARTS = ("launch/", "flower-", "flwr ", "cp ", "nginx ")
EVIL = """
import pathlib
from flwr.serverapp import ServerApp
from flwr.clientapp import ClientApp
server = ServerApp()
client = ClientApp()
@server.main()
def main(grid, context):
    pathlib.Path("{mark}").write_text("was here")
"""


class Federation:
    """Processes on loopback, started by the documented commands with other ports and folders."""

    def __init__(self, folder, tmp_path):
        self.folder, self.path = folder, tmp_path
        self.link, self.gate, *self.ports = free_ports(7)
        self.started, self.commands = [], documented()
        self.environment = os.environ | {
            "XLA_FLAGS": QUICK, "FLWR_HOME": str(tmp_path / "flower"), "PYTHONPATH": str(ROOT),
            "FLWR_TELEMETRY_ENABLED": "0",
            "PATH": f"{PROGRAMS}:{os.environ['PATH']}:/usr/sbin",
        }  # fmt: skip
        shutil.copytree(ROOT / "launch", tmp_path / "launch")
        conf = tmp_path / "launch/flower/nginx.conf"
        text = conf.read_text().replace("listen 8443", f"listen 127.0.0.1:{self.gate}")
        conf.write_text(text.replace("127.0.0.1:8000", f"127.0.0.1:{self.link}"))
        (tmp_path / "flower").mkdir()

    def command(self, start, **changes):
        """The documented command that begins so, for this machine's ports."""
        (line,) = (c for c in self.commands if c.startswith(start))
        changes = {
            "fl.example.org:8443": f"localhost:{self.gate}", "fl.example.org": "localhost",
            "--port 8000": f"--port {self.link}",
        } | changes  # fmt: skip
        for old, new in changes.items():
            line = line.replace(old, str(new))
        return line

    def run(self, line, timeout=600):
        return subprocess.run(
            ["bash", "-c", line], cwd=self.path, env=self.environment, capture_output=True,
            text=True, timeout=timeout,
        )  # fmt: skip

    def start(self, name, line, **environment):
        with (self.path / f"{name}.log").open("w") as log:
            process = subprocess.Popen(
                ["bash", "-c", f"exec {line}"], cwd=self.path, stdout=log,
                stderr=subprocess.STDOUT, env=self.environment | environment,
                start_new_session=True,
            )  # fmt: skip
        self.started.append(process)

    def log(self, name):
        return (self.path / f"{name}.log").read_text()

    def connection(self, name, port):
        """Writes the documented connection to `config.toml`, as `name`."""
        with (self.path / "flower/config.toml").open("a") as file:
            file.write(
                f'[superlink.{name}]\naddress = "127.0.0.1:{port}"\n'
                f'root-certificates = "{self.path}/keys/ca.pem"\n'
            )

    def site(self, name, port, settings, **environment):
        text = " ".join(f"{k}={json.dumps(v)}" for k, v in settings.items())
        line = self.command("flower-supernode", **{"site/node": f"{name}/node"})
        line = re.sub("--node-config .*", lambda _: f"--node-config '{text}'", line)
        self.start(name, line.replace("--port 9094", f"--port {port}"), **environment)

    def stop(self):
        for process in self.started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture
def federation(folder, tmp_path):
    """A SuperLink behind its proxy, and the registered keys of three sites and of a hostile one."""
    here = Federation(folder, tmp_path)
    try:
        done = here.run(here.command("launch/flower/certificates.sh server"))
        assert done.returncode == 0, done.stderr
        here.start("superlink", here.command("flower-superlink"))
        wait_for(f"127.0.0.1:{here.link}", tmp_path / "superlink.log")
        assert here.run(here.command("cp launch")).returncode == 0
        here.start("nginx", here.command("nginx") + " -g 'daemon off;'")
        wait_for(f"127.0.0.1:{here.gate}", tmp_path / "nginx.log")
        here.connection("mine", here.link)
        here.connection("gate", here.gate)
        for name in ("site0", "site1", "site2", "hostile", "stranger"):
            line = here.command("launch/flower/certificates.sh node")
            assert here.run(line.removesuffix("site") + name).returncode == 0
        for name in ("site0", "site1", "site2", "hostile"):
            line = here.command("flwr supernode", **{"site/": f"{name}/"})
            done = here.run(line)
            assert "egistered successfully" in done.stdout, done.stdout + done.stderr
        yield here
    finally:
        here.stop()


class Caller:
    """Somebody who holds the CA's file, and perhaps a key: calls a SuperLink's paths by hand."""

    def __init__(self, federation, port, key=None):
        context = ssl.create_default_context(cafile=federation.path / "keys/ca.pem")
        self.http = httpx.Client(base_url=f"https://localhost:{port}", verify=context)
        self.signer = None
        if key:
            private = load_ssh_private_key((federation.path / key / "node").read_bytes(), None)
            self.signer = NodeAuthHttpInterceptor(private, private.public_key())

    def __call__(self, path, message):
        """Posts a message, signed by the key; returns the HTTP status."""
        request = self.http.build_request(
            "POST", path, content=message.SerializeToString(),
            headers={"Content-Type": "application/protobuf"},
        )  # fmt: skip
        if self.signer:
            context = type("Context", (), {"request": request})
            self.signer.intercept(context, lambda _: None)
        return self.http.send(request).status_code


def test_three_sites_train_and_a_hostile_one_does_not_get_in(federation, tmp_path):
    here, tried = federation, {}
    for i in range(3):
        settings = node_config(here.folder, i) | {"workdir": str(tmp_path / f"work{i}")}
        here.site(f"site{i}", here.ports[i], settings)
    # A registered site whose operator has another program send its updates.
    shutil.copytree(ROOT / "fedsafe_jax", tmp_path / "code/fedsafe_jax")
    program = tmp_path / "code/fedsafe_jax/flower/client.py"
    honest = 'unravel(sent["updates"][0])'
    assert honest in program.read_text()
    program.write_text(program.read_text().replace(honest, f"{honest[:-1]} * float('inf'))"))
    settings = node_config(here.folder, 0) | {"client": 3, "workdir": str(tmp_path / "work3")}
    here.site("hostile", here.ports[4], settings, PYTHONPATH=str(tmp_path / "code"))
    # Who has the CA's file, which is public, and a key that nobody registered.
    here.site("stranger", here.ports[3], node_config(here.folder, 0))
    evil = tmp_path / "evil"
    shutil.copytree(ROOT / "launch/flower", evil)
    (evil / "evilapp.py").write_text(EVIL.format(mark=tmp_path / "mark"))
    project = (evil / "pyproject.toml").read_text()
    project = project.replace("fedsafe_jax.flower.server:app", "evilapp:server")
    (evil / "pyproject.toml").write_text(
        project.replace("fedsafe_jax.flower.client:app", "evilapp:client")
    )
    done = here.run("flwr run evil gate --stream", timeout=120)
    tried["runs an app of its own"] = (done.returncode, done.stdout[-300:] + done.stderr[-300:])
    assert "403" in done.stdout + done.stderr and not (tmp_path / "mark").exists()
    done = here.run("flwr supernode register stranger/node.pub gate", timeout=120)
    tried["registers its key"] = (done.returncode, done.stdout[-300:] + done.stderr[-300:])
    assert "403" in done.stdout + done.stderr
    outside = Caller(here, here.gate)
    for path in (
        "/v1/control/list-runs", "/v1/control/start-run", "/v1/runtime/acquire-task", "/docs",
        "/v1/fleet/%2e%2e/control/list-runs",
        "/v1/fleet/..%2fcontrol/list-runs", "//v1/control/list-runs", "/V1/control/list-runs",
    ):  # fmt: skip
        tried[path] = outside(path, control_pb2.ListRunsRequest())
        assert tried[path] == 403, path
    # The proxy is what keeps them out: on the server itself Flower asks for no account.
    assert Caller(here, here.link)("/v1/control/list-runs", control_pb2.ListRunsRequest()) == 200
    for name, key in (("no key", None), ("a key that is not registered", "stranger"),
                      ("the key of another site", "hostile")):  # fmt: skip
        forge = Caller(here, here.gate, key)
        victim = Node(node_id=victim_of(here))
        push = fleet_pb2.PushMessagesRequest(node=victim)
        pull = fleet_pb2.PullMessagesRequest(node=victim)
        for path, message in (("push-messages", push), ("pull-messages", pull)):
            tried[f"{path} of a site, {name}"] = status = forge(f"/v1/fleet/{path}", message)
            assert status == 401, (path, name)
    with pytest.raises((ssl.SSLError, ConnectionError, httpx.HTTPError)):
        httpx.post(f"https://localhost:{here.gate}/v1/fleet/pull-messages", verify=True)
    plain = socket.create_connection(("127.0.0.1", here.gate), timeout=10)
    plain.sendall(b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: x\r\n\r\n")
    assert b" 400 " in plain.recv(100)
    plain.close()
    settings = run_config(tmp_path / "server", "num_clients=4", "clients_per_round=4") | {
        "wait-seconds": 200,
        "round-seconds": 200,
    }
    text = " ".join(f"{k}={json.dumps(v)}" for k, v in settings.items())
    quoted = shlex.quote(text)  # tuples in it have quotes of their own
    line = re.sub("--run-config .*", lambda _: f"--run-config {quoted}", here.command("flwr run"))
    done = here.run(line, timeout=900)
    assert (tmp_path / "server/results.json").is_file(), "\n".join(
        [done.stdout[-3000:], done.stderr[-3000:], here.log("superlink")[-3000:]]
    )
    for row in rows(tmp_path / "server"):  # the honest sites train without the hostile one
        assert [*row["no_answer"], *row["excluded"]] == [3] and not row["skipped"]
    assert all(np.isfinite(x).all() for x in exported(tmp_path / "server").values())
    tried["connects with a key that is not registered"] = here.log("stranger")[-300:]
    assert not (tmp_path / "mark").exists()
    # The same app, past the proxy: whoever reaches the SuperLink's own port runs code there.
    done = here.run("flwr run evil mine --stream", timeout=120)
    assert (tmp_path / "mark").exists(), done.stdout + done.stderr
    print(json.dumps(tried, indent=1))


def victim_of(here):
    """Returns the node id of a site, which is no secret."""
    for _ in range(120):
        listed = here.run("flwr supernode list mine --format json").stdout
        online = [n for n in json.loads(listed)["nodes"] if n["status"] == "online"]
        if online:
            return int(online[0]["node-id"])
        time.sleep(1)
    raise AssertionError(listed)
