"""What the tests of the servers share: a server on a real port, and pictures."""

import io
import threading
import time
from contextlib import contextmanager

import numpy as np


@contextmanager
def serving(app, **options):
    """The address of ``app``, served by uvicorn in a thread."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", access_log=False, **options))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
    assert not thread.is_alive()


def picture(seed, side=32, form="PNG"):
    """An image file of soft random colours."""
    from PIL import Image

    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC).save(file, form)
    return file.getvalue()
