"""What the tests of the servers share: a server on a real port, and pictures."""

import io
import socket
import threading
from contextlib import contextmanager

import numpy as np


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
    from PIL import Image

    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC).save(file, form)
    return file.getvalue()
