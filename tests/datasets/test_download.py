"""`get`, against a server on this machine that behaves well and badly."""

import errno
import hashlib
import os
import shutil
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from companion import CompanionError, datasets
from companion.datasets import download, inventory


class Handler(BaseHTTPRequestHandler):
    """Each path is a way to answer; the server carries the archive and notes who asked."""

    def do_GET(self):
        self.server.asked.append((self.path, self.headers["User-Agent"]))
        getattr(self, self.path.lstrip("/").replace("-", "_"))(self.server.content)

    def send(self, content: bytes, length: int | None, then=lambda: None) -> None:
        self.send_response(200)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()
        then()

    def right(self, content):
        self.send(content, len(content))

    def without_length(self, content):
        self.send(content, None)

    def redirect(self, content):
        self.send_response(302)
        self.send_header("Location", "/right")
        self.end_headers()

    def redirect_to_ftp(self, content):
        self.send_response(302)
        self.send_header("Location", "ftp://127.0.0.1/right")
        self.end_headers()

    def redirect_for_ever(self, content):
        self.send_response(302)
        self.send_header("Location", "/redirect-for-ever")
        self.end_headers()

    def missing(self, content):
        self.send_error(404)

    def failing(self, content):
        self.send_error(500)

    def truncated(self, content):
        self.send(content[: len(content) // 2], len(content))

    def truncated_without_length(self, content):
        self.send(content[: len(content) // 2], None)

    def hanging(self, content):
        self.send(content[: len(content) // 2], len(content), self.server.over.wait)

    def silent(self, content):
        self.server.over.wait()

    def forged(self, content):
        self.send(bytes([content[0] ^ 1]) + content[1:], len(content))

    def another_file(self, content):
        self.send(b"<html>Log in to the hotel's network</html>", 41)

    def endless(self, content):
        """Sends until the other side hangs up."""
        with_more = content + bytes(1000)
        self.send(with_more, None)
        while not self.server.over.is_set():
            self.wfile.write(bytes(1000))

    def chunked_broken(self, content):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"1000\r\n" + content[:100])

    def nonsense(self, content):
        self.wfile.write(b"SSH-2.0-OpenSSH\r\n")

    protocol_version = "HTTP/1.0"

    def log_message(self, *arguments):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request, client_address):
        """A client that hangs up is what some tests want."""


@pytest.fixture
def server(tiny_cifar10, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with Server(("127.0.0.1", 0), Handler) as server:
        server.content, server.asked, server.over = tiny_cifar10.content, [], threading.Event()
        server.url = f"http://127.0.0.1:{server.server_port}"
        table = {
            "downloads": {
                "cifar10": {
                    "url": f"{server.url}/right",
                    "sha256": hashlib.sha256(server.content).hexdigest(),
                    "bytes": len(server.content),
                }
            },
            "shipped": {},
            "generated": {},
        }
        for module in (download, inventory):
            monkeypatch.setattr(module, "manifest", lambda: table)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.over.set()
        server.shutdown()
        thread.join()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


FILES = sorted(["batches.meta", "test_batch", *(f"data_batch_{i}" for i in range(1, 6))])


def assert_whole(data_folder, tiny_cifar10):
    assert names(data_folder) == ["cifar-10-batches-py"]
    assert names(data_folder / "cifar-10-batches-py") == FILES  # no link, nothing outside
    assert not (data_folder.parent / "evil").exists()
    assert np.array_equal(datasets.load("cifar10", split="test").images, tiny_cifar10.images["test"])


@pytest.mark.parametrize("path", ["/right", "/without-length", "/redirect"])
def test_downloads_and_unpacks(server, data_folder, tiny_cifar10, path):
    assert datasets.get("cifar10", url=server.url + path) == data_folder / "cifar-10-batches-py"
    assert_whole(data_folder, tiny_cifar10)
    assert server.asked[0][1].startswith("companion/")


def test_takes_the_address_from_the_manifest_and_asks_only_once(server, data_folder, tiny_cifar10):
    first, second = datasets.get("cifar10"), datasets.get("cifar10")
    assert first == second
    assert len(server.asked) == 1
    assert_whole(data_folder, tiny_cifar10)


def test_replaces_a_damaged_copy(server, data_folder, tiny_cifar10):
    (datasets.get("cifar10") / "test_batch").write_bytes(b"damaged")
    datasets.get("cifar10")
    assert len(server.asked) == 2
    assert_whole(data_folder, tiny_cifar10)


def test_what_a_killed_process_left_is_swept_away(server, data_folder, tiny_cifar10):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left, living = (data_folder / f".cifar-10-batches-py.{process}.part" for process in (dead.pid, os.getppid()))
    for folder in (left, living):
        (folder / "cifar-10-batches-py").mkdir(parents=True)
        (folder / "right").write_bytes(b"half")
    datasets.get("cifar10")
    assert (living / "right").read_bytes() == b"half"  # another process is downloading
    shutil.rmtree(living)
    assert_whole(data_folder, tiny_cifar10)


def test_an_archive_put_there_by_hand_is_unpacked(server, data_folder, tiny_cifar10):
    data_folder.mkdir(parents=True)
    (data_folder / "right").write_bytes(tiny_cifar10.content)
    datasets.get("cifar10")
    assert server.asked == []
    (data_folder / "right").unlink()
    assert_whole(data_folder, tiny_cifar10)


def test_a_forged_archive_put_there_by_hand_is_refused(server, data_folder, tiny_cifar10):
    data_folder.mkdir(parents=True)
    (data_folder / "right").write_bytes(tiny_cifar10.content + b"!")
    with pytest.raises(CompanionError, match=r"right has the wrong checksum: remove it\.$"):
        datasets.get("cifar10")
    assert names(data_folder) == ["right"]


def test_a_damaged_zip_is_not_hidden_by_a_download(server, data_folder):
    data_folder.mkdir(parents=True)
    (data_folder / "cifar10.zip").write_bytes(b"no zip")
    with pytest.raises(CompanionError, match=r"cifar10.zip is damaged \(.*\): remove it first\.$"):
        datasets.get("cifar10")


def refused(data_folder, match: str, **options) -> None:
    with pytest.raises(CompanionError, match=match) as caught:
        datasets.get("cifar10", **options)
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)
    assert not data_folder.exists() or names(data_folder) == []


@pytest.mark.parametrize(
    ("path", "match"),
    [
        ("/missing", "answered 404"),
        ("/failing", "answered 500"),
        ("/truncated", r"broke off after [\d,]+ of [\d,]+ bytes"),
        ("/truncated-without-length", r"broke off after [\d,]+ of [\d,]+ bytes"),
        ("/chunked-broken", "broke off after"),
        ("/hanging", r"sent nothing for 0.5 s after [\d,]+ of [\d,]+ bytes"),
        ("/silent", "did not answer within 0.5 s"),
        ("/forged", "another file: its checksum is wrong"),
        ("/another-file", "another file: 41 bytes instead of"),
        ("/endless", "another file: more than"),
        ("/redirect-to-ftp", "ftp"),
        ("/redirect-for-ever", "answered 302"),
        ("/nonsense", "cannot reach"),
    ],
)
def test_refuses_and_leaves_nothing(server, data_folder, path, match):
    refused(data_folder, match, url=server.url + path, timeout=0.5)


@pytest.mark.parametrize("url", ["ftp://127.0.0.1/x", "file:///etc/passwd", "data:,x", "x", "http://", "http://[x"])
def test_refuses_other_addresses(server, data_folder, url):
    refused(data_folder, "cannot reach", url=url)
    assert server.asked == []


def test_refuses_when_nobody_listens(server, data_folder):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    refused(
        data_folder, f"cannot reach http://127.0.0.1:{port}/x: Connection refused", url=f"http://127.0.0.1:{port}/x"
    )


@pytest.mark.parametrize("name", ["digits", "hard_digits", "folder:x", "mnist"])
def test_refuses_what_is_nothing_to_download(data_folder, name):
    with pytest.raises(CompanionError, match=r"nothing to download: choose cifar10\.$"):
        datasets.get(name)
    assert not data_folder.exists()


def test_an_interrupt_leaves_nothing(server, data_folder, monkeypatch):
    whole = download._read

    def interrupted(url, response, timeout, place):
        if "after 0 " not in place:
            raise KeyboardInterrupt
        return whole(url, response, timeout, place)

    monkeypatch.setattr(download, "_read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        datasets.get("cifar10")
    assert names(data_folder) == []


def test_an_interrupt_while_unpacking_leaves_nothing(server, data_folder, monkeypatch):
    def interrupted(source, target):
        target.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copyfileobj", interrupted)
    with pytest.raises(KeyboardInterrupt):
        datasets.get("cifar10")
    assert names(data_folder) == []


def test_a_data_folder_that_cannot_be_made_is_refused(server, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("COMPANION_DATA", str(tmp_path / "file" / "data"))
    with pytest.raises(CompanionError, match=rf"cannot write into .*: {os.strerror(errno.ENOTDIR)}\.$"):
        datasets.get("cifar10")


@pytest.fixture
def tmpfs(tmp_path):
    """A file system with room for 1 MiB."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("only root may mount a small file system")
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mounting a small file system failed: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("room", ["for nothing", "for the archive"])
def test_a_full_disk_is_refused(server, tmpfs, tiny_cifar10, monkeypatch, room):
    monkeypatch.setenv("COMPANION_DATA", str(tmpfs))
    pages = 2**20 // 4096 - (len(tiny_cifar10.content) // 4096 + 8 if room == "for the archive" else 8)
    (tmpfs / "other").write_bytes(bytes(4096 * pages))
    with pytest.raises(CompanionError, match=rf"cannot write into .*small: {os.strerror(errno.ENOSPC)}\.$"):
        datasets.get("cifar10")
    assert names(tmpfs) == ["other"]


def test_verify_and_catalogue_know_what_was_downloaded(server, data_folder, tiny_cifar10):
    def state():
        return next(entry.state for entry in datasets.catalogue() if entry.name == "cifar10")

    assert state() == "missing"
    assert datasets.verify() == []
    folder = datasets.get("cifar10")
    (data_folder / "right").write_bytes(tiny_cifar10.content)
    assert state() == "present"
    assert [check.ok for check in datasets.verify()] == [True, True]
    (folder / "data_batch_3").write_bytes(b"damaged")
    (data_folder / "right").write_bytes(b"damaged")
    archive, unpacked = datasets.verify()
    assert (archive.what, archive.ok) == (str(data_folder / "right"), False)
    assert (unpacked.what, unpacked.ok) == (str(folder), False)
    assert "data_batch_3" in unpacked.message
