"""A Horovod run on two hosts: network namespaces with an address and an SSH server each, joined by a cable."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest

SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
IP = shutil.which("ip", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def may_make_hosts() -> bool:
    """Root in a container often may not."""
    name = f"companion-{os.getpid()}-try"
    made = bool(IP) and subprocess.run([IP, "netns", "add", name], capture_output=True).returncode == 0
    if made:
        subprocess.run([IP, "netns", "delete", name], check=True, capture_output=True)
    return made


pytestmark = [
    pytest.mark.skipif(find_spec("horovod") is None, reason="Horovod is not built here (make horovod)"),
    pytest.mark.skipif(not (SSHD and IP and shutil.which("ssh")), reason="needs ip, ssh and sshd"),
    pytest.mark.skipif(not may_make_hosts(), reason="cannot make network namespaces here, which takes root's rights"),
    pytest.mark.stress,
    pytest.mark.timeout(600),
]

NETWORK = "10.231.77."  # of a range for private use; these two hosts see no other network
CABLE = "cable"
TIMEOUT = 10  # seconds after which Horovod gives up on a host
TRAIN = [sys.executable, "-m", "companion", "train", "simple_cnn", "--threads", "1", "--distributed", "horovod"]


def ip(*words, check=True):
    return subprocess.run([IP, *words], check=check, capture_output=True, text=True)


class Hosts:
    """Two of them; a context that leaves nothing behind."""

    def __init__(self, folder):
        self.folder = folder
        self.names = [f"companion-{os.getpid()}-{i}" for i in (1, 2)]
        self.addresses = [f"{NETWORK}{i}" for i in (1, 2)]
        self.servers = []

    def __enter__(self):
        try:
            for name, address in zip(self.names, self.addresses, strict=True):
                ip("netns", "add", name)
                # `ip netns exec` shows this as /etc/hosts. Horovod's worker groups take the address that a host's own
                # name has, whatever interface was asked for, and on Debian that is 127.0.1.1.
                settings = Path("/etc/netns") / name
                settings.mkdir(parents=True)
                (settings / "hosts").write_text(f"127.0.0.1 localhost\n{address} {socket.gethostname()}\n")
                ip("-n", name, "link", "set", "lo", "up")
            one, two = self.names
            ip("link", "add", CABLE, "netns", one, "type", "veth", "peer", "name", CABLE, "netns", two)
            for name, address in zip(self.names, self.addresses, strict=True):
                ip("-n", name, "address", "add", f"{address}/24", "dev", CABLE)
                ip("-n", name, "link", "set", CABLE, "up")
            self._serve()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _serve(self):
        """An SSH server on each, with keys that exist for this test alone."""
        Path("/run/sshd").mkdir(exist_ok=True)  # where sshd locks itself in
        for key in ("host", "user"):
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / key],
                check=True,
                capture_output=True,
            )
        (self.folder / "sshd").write_text(
            f"Port 22\nHostKey {self.folder}/host\nAuthorizedKeysFile {self.folder}/user.pub\n"
            "StrictModes no\nUsePAM no\nPermitRootLogin prohibit-password\nPidFile none\nPermitUserEnvironment no\n"
        )
        # Horovod calls `ssh`: this one knows the key, remembers no host, and notices that one is gone, but after
        # Horovod, which has more to say about it.
        tools = self.folder / "bin"
        tools.mkdir()
        (tools / "ssh").write_text(
            f"#!/bin/sh\nexec {shutil.which('ssh')} -F none -i {self.folder}/user -o UserKnownHostsFile=/dev/null "
            f'-o LogLevel=ERROR -o ServerAliveInterval={TIMEOUT} -o ServerAliveCountMax=3 "$@"\n'
        )
        (tools / "ssh").chmod(0o755)
        for name in self.names:
            self.servers.append(
                subprocess.Popen(
                    [
                        IP,
                        "netns",
                        "exec",
                        name,
                        SSHD,
                        "-D",
                        "-E",
                        self.folder / f"{name}.log",
                        "-f",
                        self.folder / "sshd",
                    ],
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
            )

    def __exit__(self, *_):
        for name in self.names:
            for process in ip("netns", "pids", name, check=False).stdout.split():
                with suppress(ProcessLookupError):
                    os.kill(int(process), signal.SIGKILL)
            ip("netns", "delete", name, check=False)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)
        for server in self.servers:
            server.wait()

    def processes(self):
        """Those of both hosts, but for their SSH servers."""
        found = {int(pid) for name in self.names for pid in ip("netns", "pids", name).stdout.split()}
        commands = {}
        for pid in found:
            with suppress(OSError):
                commands[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        return {pid: command for pid, command in commands.items() if "sshd" not in command}

    def start(self, *more):
        command = ["horovodrun", "-np", "2", "-H", ",".join(f"{address}:1" for address in self.addresses)]
        options = ["--network-interfaces", CABLE, "--gloo-timeout-seconds", str(TIMEOUT), "--disable-cache"]
        path = os.pathsep.join([str(self.folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
        return subprocess.Popen(
            [IP, "netns", "exec", self.names[0], *command, *options, *TRAIN, *more],
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Without the tests' guard against networks: this one is between two names of this machine.
            env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"PATH": path},
        )


@pytest.fixture
def hosts(tmp_path):
    with Hosts(tmp_path) as found:
        yield found


def test_two_hosts_train_together(hosts):
    with hosts.start("--epochs", "3", "--out", "w.safetensors") as process:
        places = set()
        for line in process.stdout:
            if "epoch" in line:
                for pid, command in hosts.processes().items():
                    if command.startswith(f"{sys.executable} -m companion train"):
                        places.add(ip("netns", "identify", str(pid), check=False).stdout.strip())
            last = line
        assert process.wait(timeout=60) == 0, process.stderr.read()
    assert places - {""} == set(hosts.names)
    assert float(re.search(r"test  accuracy ([\d.]+) %", last)[1]) > 80
    assert (hosts.folder / "w.safetensors").exists()


def test_a_cut_cable_ends_the_run_with_one_sentence(hosts):
    process = hosts.start("--epochs", "1000", "--out", "w.safetensors")
    for line in process.stdout:
        if "epoch   1 " in line:
            break
    else:
        pytest.fail(process.stderr.read())
    ip("-n", hosts.names[1], "link", "set", CABLE, "down")
    cut = time.monotonic()
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert len(re.findall(r"companion: worker 0 of 2 lost the others \(one died, or the network", err)) == 1, err
    # Time-outs, not speed: Horovod's own, twice at most, and what the machine needs to notice.
    assert time.monotonic() - cut < 2 * TIMEOUT + 30
    deadline = time.monotonic() + 2 * TIMEOUT + 30
    while hosts.processes() and time.monotonic() < deadline:
        time.sleep(0.5)
    assert hosts.processes() == {}
