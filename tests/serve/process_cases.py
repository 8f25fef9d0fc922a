"""A server as a process of its own: started as a user starts it, watched through /proc, stopped by its number."""

import asyncio
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

COLOURS = 255  # classes of the network of `colours_file`
CULPRIT = 255  # the red on which that network raises
PLAIN = False  # nothing here is encrypted, and to read the certificates of the world takes longer than an answer


def colours_file(folder, work=0, backwards=False):
    """An ONNX network that classifies 8×8 images by their red, 0 … 254, and cannot run an image of red 255.

    With x the red, class k scores 2kx − k² = x² − (x − k)², the highest at k = x.

    Args:
        folder: where to write it.
        work: million MACs for each image on top, without a trace in the answer.
        backwards: count the classes from the end, so that red x is class 254 − x.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    classes = np.arange(COLOURS, dtype=np.float32)[:: -1 if backwards else 1]
    red = np.repeat(np.float32([255 / 64, 0, 0]), 64)[:, None]
    constants = {"red": red, "twice": 2 * classes, "squares": classes**2, "table": 0 * classes}
    nodes = [
        helper.make_node("Flatten", ["input"], ["flat"]),
        helper.make_node("MatMul", ["flat", "red"], ["mean"]),
        helper.make_node("Round", ["mean"], ["x"]),
        helper.make_node("Mul", ["x", "twice"], ["products"]),
        helper.make_node("Sub", ["products", "squares"], ["scores"]),
        # ONNX Runtime raises for what is beyond the table.
        helper.make_node("Cast", ["x"], ["number"], to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "number"], ["refuses"]),
        helper.make_node("Add", ["scores", "refuses"], ["answer"]),
    ]
    if work:
        constants |= {"widen": np.zeros((192, 1000), np.float32), "square": np.zeros((1000, 1000), np.float32)}
        constants |= {"narrow": np.zeros((1000, COLOURS), np.float32)}
        nodes.append(helper.make_node("MatMul", ["flat", "widen"], ["wide_0"]))
        steps = [helper.make_node("MatMul", [f"wide_{n}", "square"], [f"wide_{n + 1}"]) for n in range(work)]
        nodes += [*steps, helper.make_node("MatMul", [f"wide_{work}", "narrow"], ["nothing"])]
    nodes.append(helper.make_node("Add", ["answer", "nothing" if work else "refuses"], ["output"]))
    taken = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, 8, 8])
    given = helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", COLOURS])
    held = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "colours", [taken], [given], held), opset_imports=[helper.make_opsetid("", 18)]
    )
    onnx.checker.check_model(model)
    path = Path(folder) / "colours.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def coloured(red, side=8):
    """An image file that the network knows by its number; the green and blue are noise to it."""
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (side, side), (red, 255 - red, red // 2)).save(file, "PNG")
    return file.getvalue()


@dataclass
class Server:
    process: subprocess.Popen
    url: str
    log: Path

    @property
    def address(self):
        host, _, port = self.url.removeprefix("http://").partition(":")
        return host, int(port)

    def pids(self):
        """The process and its workers."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [self.process.pid, *map(int, children)]

    def workers(self):
        """Those who answer; the helper that multiprocessing starts beside them is none."""
        return [pid for pid in self.pids()[1:] if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def rss(self):
        """Bytes in memory, of all processes."""
        pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in self.pids())
        return pages * os.sysconf("SC_PAGE_SIZE")

    def cpu(self):
        """Seconds of CPU used by all threads that are there now; in nanoseconds exact, unlike what top reads."""
        threads = (thread for pid in self.pids() for thread in Path(f"/proc/{pid}/task").iterdir())
        return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9

    def faults(self):
        """Lines of stderr that tell of a fault: those that are no records of the log, and errors in it."""
        found = []
        for line in self.log.read_text(encoding="utf-8").splitlines():
            try:
                level = json.loads(line)["level"].lower()
            except (ValueError, KeyError, TypeError):
                level = "warning" if line.startswith("WARNING:") else "none"
            if level not in ("debug", "info", "warning"):
                found.append(line)
        return found

    def metric(self, name, **labels):
        """The value of a metric such as ``companion_batch_size_count``, summed over all labels but those given."""
        text = httpx.get(f"{self.url}/metrics", timeout=60, verify=PLAIN).text
        samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
        return sum(each.value for each in samples if each.name == name and labels.items() <= each.labels.items())

    def stop(self, how=signal.SIGTERM, seconds=120):
        """Send a signal and await the end, so many seconds: the exit status."""
        self.process.send_signal(how)
        return self.process.wait(seconds)


@contextmanager
def started(folder, model, *options, **environment):
    """A `Server` that is ready, from ``companion serve image``; its settings through the environment or as options."""
    log = Path(folder) / f"stderr-{time.monotonic_ns()}"
    command = [sys.executable, "-m", "companion", "serve", "image", "--model", model, "--port", "0", *options]
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [str(part) for part in command],
            env={**os.environ, **{f"COMPANION_SERVE_{key.upper()}": str(value) for key, value in environment.items()}},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    try:
        found = re.search(r"http://127\.0\.0\.1:\d+", line := process.stdout.readline())
        assert found, (line, log.read_text())
        server = Server(process, found.group(), log)
        until(lambda: is_ready(server.url), 120)
        yield server
    finally:
        if process.poll() is None:
            pids = Server(process, "", log).pids()
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                for pid in pids:
                    os.kill(pid, signal.SIGKILL)
                process.wait()
        process.stdout.close()


def is_ready(url):
    try:
        return httpx.get(f"{url}/ready", timeout=60, verify=PLAIN).status_code == 200
    except httpx.TransportError:
        return False


def until(condition, seconds=60):
    """Ask again and again; fail when the time is over."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about in time"
        time.sleep(0.01)


def http(kind, body):
    """The bytes of a request with an image or a form."""
    head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def ask(reader, writer, request):
    """Send a request and read the answer: status, headers and body.

    Raises:
        asyncio.IncompleteReadError, ConnectionError: the connection ended before that; ``partial`` is what came.
    """
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines if line)
    try:
        body = await reader.readexactly(int(headers["content-length"]))
    except asyncio.IncompleteReadError as error:
        raise asyncio.IncompleteReadError(head + error.partial, None) from error
    return int(status.split()[1]), headers, body


def post(url, content, kind="image/png", **headers):
    headers = {"content-type": kind, **headers}
    return httpx.post(f"{url}/predict", content=content, headers=headers, timeout=60, verify=PLAIN)


def post_files(url, files):
    parts = [("files", ("a.png", file)) for file in files]
    return httpx.post(f"{url}/predict", files=parts, timeout=60, verify=PLAIN)
