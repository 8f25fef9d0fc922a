"""Workers that die or do not start, and how services are opened and closed, without processes."""

import asyncio
import errno
import math
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from companion import engines, models

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("httptools", reason="the extra serve is not installed")
from companion.serve import main, process
from companion.serve.batching import Batcher
from companion.serve.image import image_app
from companion.serve.models import Model
from companion.serve.service import Service
from companion.serve.settings import Settings

sys.path.insert(0, str(Path(__file__).parent))
from server_cases import Slow, red


@pytest.fixture
def workers():
    return process.Workers(lambda: None, Settings(), None, 1, "nowhere")


def test_a_worker_that_dies_soon_waits_longer_each_time(workers, monkeypatch):
    monkeypatch.setattr(process.time, "monotonic", lambda: 1000.0)
    (worker,) = workers._workers

    def pause(lived):
        worker.since = math.inf if lived is None else 1000.0 - lived
        workers._again(worker, {})
        assert not worker.ready
        return worker.due - 1000.0

    assert [pause(lived) for lived in (None, None, 1, 29, None, 1, 1, 1)] == [0, 1, 2, 4, 8, 16, 30, 30]
    assert [pause(lived) for lived in (30, 29, 1000, 1)] == [0, 1, 0, 1]


class Processes:
    """A context whose processes are ready at once, after the first could not be started."""

    def __init__(self):
        self.tried, self.terminated = 0, 0
        self.pid = 0
        self.sentinel, self._other = socket.socketpair()

    def Pipe(self):
        return process.multiprocessing.Pipe()

    def Process(self, target, args, daemon):
        self._pipe = args[3]
        return self

    def start(self):
        self.tried += 1
        if self.tried == 1:
            raise BlockingIOError(errno.EAGAIN, "too many processes")
        self._pipe.send(True)

    def terminate(self):
        self.terminated += 1

    def join(self, timeout):
        pass

    def is_alive(self):
        return False

    def close(self):
        self.sentinel.close()
        self._other.close()


def test_a_start_that_fails_is_tried_again_and_workers_end_with_their_parent(workers):
    def started():
        raise OSError("nobody reads this")

    workers._context = Processes()
    with pytest.raises(OSError, match="nobody reads this"):
        workers.run(started)
    workers._context.close()
    assert (workers._context.tried, workers._context.terminated) == (2, 1)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no SIGHUP")
def test_a_worker_that_is_gone_needs_not_reload():
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait(60)
    process.Worker(0, process=gone).hang_up()


def test_the_parent_of_workers_keeps_no_model(tmp_path, monkeypatch):
    class Stub:
        def __init__(self, *arguments):
            pass

        def run(self, started):
            assert len(closed) == 2

    closed = []
    monkeypatch.setattr(engines.Engine, "close", lambda engine: closed.append(engine))
    monkeypatch.setattr(process, "Workers", Stub)
    monkeypatch.setattr(main, "leave", lambda code: None)
    monkeypatch.setattr(main.logs, "configure", lambda level: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    path = tmp_path / "m.safetensors"
    models.save(models.create("simple_cnn", seed=0), path)
    main.run(
        "image",
        {"a": path, "b": path},
        engine=None,
        host="127.0.0.1",
        port=0,
        workers=2,
        settings=Settings(),
        announce=lambda address: None,
    )
    assert len(closed) == 2


@pytest.mark.parametrize("how", ["replaced", "asked"])
def test_what_happens_to_a_file_before_the_service_runs_is_not_missed(tmp_path, how):
    path = tmp_path / "model"
    path.write_text("old")
    loads = []

    def load():
        text = path.read_text()
        loads.append(text)
        return Model(lambda items: [text] * len(items), example=0)

    async def live():
        async with service.running():
            while service.counted.stats()["models"]["m"].get("reloads") != {"done": 1}:
                await asyncio.sleep(0.001)
            return await service.predict([0])

    service = Service.of_file(path, load, Settings(), name="m")
    if how == "replaced":
        (tmp_path / "new").write_text("new one")
        (tmp_path / "new").replace(path)
        expected = "new one"
    else:
        service.reload()
        expected = "old"
    assert asyncio.run(asyncio.wait_for(live(), 60)) == [expected]
    assert loads == ["old", expected]


def test_models_that_hang_do_not_hold_up_the_end_nor_each_other(monkeypatch):
    hanging = {name: Slow() for name in ("a", "b", "c")}
    app = image_app(hanging, settings=Settings())
    close, closing, most = Batcher.close, 0, 0

    async def counted(self, **options):
        nonlocal closing, most
        closing += 1
        most = max(most, closing)
        await close(self, **options)
        closing -= 1

    async def live():
        async with app.framework.router.lifespan_context(app):
            for engine in hanging.values():
                engine.gate.clear()
            asked = [service.batcher.enqueue([red(1)])[0] for service in app.services.values()]
            while any(len(engine.sizes) < 3 for engine in hanging.values()):
                await asyncio.sleep(0.001)
        await asyncio.gather(*asked, return_exceptions=True)
        return [service.batcher.queue.busy for service in app.services.values()]

    monkeypatch.setattr(Batcher, "close", counted)
    try:
        # The gates would give way after 20 seconds.
        assert asyncio.run(asyncio.wait_for(live(), 15)) == [True] * 3
    finally:
        for engine in hanging.values():
            engine.gate.set()
    assert most == 3
