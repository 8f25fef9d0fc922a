"""What the tests of the servers share: a server on a real port, and pictures."""

import io
import socket
import threading
import time
from contextlib import contextmanager

import httpx
import numpy as np
from PIL import Image

from companion import engines


@contextmanager
def serving(app, **options):
    """The address of ``app``, served in a thread, with these settings of connections."""
    from companion.serve.process import Server, bound
    from companion.serve.settings import Settings

    started = threading.Event()
    server = Server(app, Settings(**options), started.set)
    listening = bound(socket.AF_INET, ("127.0.0.1", 0), together=False)
    listening.listen(2048)
    address = f"http://127.0.0.1:{listening.getsockname()[1]}"
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        assert started.wait(60)
        yield address
    finally:
        server.end()
        thread.join(60)
    assert not thread.is_alive()


def picture(seed, side=32, form="PNG"):
    """An image file of soft random colours."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC).save(file, form)
    return file.getvalue()


class Slow(engines.Engine):
    """A network whose calls wait at a gate; it classifies by the first pixel's red."""

    def __init__(self, classes=256):
        taken = engines.TensorInfo("input", "float32", (None, 3, 8, 8))
        given = engines.TensorInfo("output", "float32", (None, classes))
        super().__init__("slow", [taken], [given], engines.Metadata(input_size=(3, 8, 8)))
        self.gate, self.sizes, self.classes = threading.Event(), [], classes
        self.gate.set()

    def _run(self, inputs):
        (images,) = inputs.values()
        self.sizes.append(len(images))
        assert self.gate.wait(20)
        return {"output": np.eye(self.classes, dtype=np.float32)[np.rint(images[:, 0, 0, 0] * 255).astype(int)]}

    def _release(self):
        pass


def red(value):
    """An 8×8 picture that `Slow` knows by its number."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


def until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def post(url, content, kind="image/png", **headers):
    """Without the certificates of the world, which take longer to read than an answer and are not needed."""
    headers = {"content-type": kind, **headers}
    return httpx.post(f"{url}/predict", content=content, headers=headers, timeout=60, verify=False)
