"""Videos: every frame delivered or counted, whatever clip, camera and loop do; bounded memory; clean ends."""

import os
import re
import struct
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from companion import CompanionError, datasets, detect, engines
from companion.detect import Detections, Detector, Frames, frames, is_video, video, watch, write_video

cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")

MODELS = Path(os.environ.get("COMPANION_TEST_DATA") or "nowhere").parent / "models"


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("frames of")]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """60 frames at 25 a second, in both formats; frame n has a white column at 2n, on a red ground with noise."""
    folder = tmp_path_factory.mktemp("clips")
    noise = np.random.RandomState(0).randint(0, 40, (60, 96, 128, 3)).astype(np.uint8)
    noise[:, :, :, 0] += 150
    for n in range(60):
        noise[n, :, 2 * n : 2 * n + 8] = 255
    for suffix in ("mp4", "avi"):
        write_video(folder / f"a.{suffix}", noise)
    return folder


def column(image):
    """Which frame of `clips` this is: by the white column, which alone is blue."""
    bright = np.convolve(image[:, :, 2].astype(int).sum(0), np.ones(8, int), "valid")
    return int(bright.argmax()) // 2


class Capture:
    """OpenCV's interface; ``None`` is a read that fails; ``waits`` are the reads that wait for an event."""

    def __init__(self, images, *, fps=25.0, count=0.0, stamps=None, waits=None):
        self.images, self.fps, self.count, self.stamps = list(images), fps, count, stamps
        self.at, self.released, self.waits = -1, 0, waits or {}

    def get(self, key):
        stamp = 1000 * (self.at / 25 if self.stamps is None else self.stamps[self.at])
        return {cv2.CAP_PROP_FPS: self.fps, cv2.CAP_PROP_FRAME_COUNT: self.count, cv2.CAP_PROP_POS_MSEC: stamp}[key]

    def grab(self):
        self.at += 1
        if self.at in self.waits:
            self.waits[self.at].wait()
        return self.at < len(self.images) and self.images[self.at] is not None

    def retrieve(self):
        return True, self.images[self.at]

    def release(self):
        self.released += 1


def pictures(count):
    return [np.full((4, 6, 3), n % 256, np.uint8) for n in range(count)]


def nothing(image):
    return Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64), ())


def one(image):
    return Detections(np.array([[2, 2, 20, 30]], np.float32), np.ones(1, np.float32), np.zeros(1, np.int64), ("x",))


def until(condition):
    """Wait for another thread; a test that waits for ever is ended by its time limit."""
    while not condition():
        time.sleep(0.001)


@pytest.mark.parametrize("suffix", ["mp4", "avi"])
def test_every_frame_of_a_clip(clips, suffix):
    clip = frames(clips / f"a.{suffix}")
    seen = []
    for n, frame in enumerate(clip):
        assert (frame.image.shape, frame.image.dtype, frame.number) == ((96, 128, 3), np.uint8, n)
        assert frame.time == pytest.approx(n / 25, abs=1e-3)
        assert frame.read_seconds > 0
        assert frame.wait_seconds >= 0
        assert frame.image[:, :, 0].mean() > 1.5 * frame.image[:, :, 2].mean()  # red first
        seen.append(column(frame.image))
    assert np.abs(np.array(seen) - np.arange(60)).max() <= 1  # compressed, so about where it was
    assert (clip.promised, clip.read, clip.delivered, clip.dropped, clip.trouble) == (60, 60, 60, 0, None)
    assert clip.rate == 25
    with pytest.raises(CompanionError, match=r"can be read once: open it again\.$"):
        next(iter(clip))


def test_at_most_the_queue_and_a_few_frames_are_alive(tmp_path, monkeypatch):
    """A loop that takes a frame only when the thread can read no further: the worst there is."""
    write_video(tmp_path / "long.avi", datasets.digit_clip(frames=300, size=64).frames)
    alive: weakref.WeakSet[np.ndarray] = weakref.WeakSet()
    convert = video._rgb

    class Tracked(np.ndarray):
        __hash__ = object.__hash__

    def tracked(image):
        image = convert(image).view(Tracked)
        alive.add(image)
        return image

    monkeypatch.setattr(video, "_rgb", tracked)
    most = count = 0
    clip = frames(tmp_path / "long.avi", ahead=4)
    for _ in clip:
        until(lambda: len(clip._queue) == 4 or clip._over)
        count += 1
        most = max(most, len(alive))
    assert count == clip.delivered == 300
    assert 5 <= most <= 4 + 3  # in the queue; in the loop, in the thread's hands, and just handed over


class Clock:
    """Goes on when somebody sleeps, and only then."""

    def __init__(self):
        self.now, self.slept = 100.0, []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


def test_at_its_frame_rate_each_frame_is_released_at_its_time():
    clock = Clock()
    clip = Frames(Capture(pictures(300)), "x", realtime=True, ahead=300, clock=clock, sleep=clock.sleep)
    loop = iter(clip)
    assert next(loop).time == 0
    until(lambda: clip._over)
    assert clock.slept == pytest.approx([1 / 25] * 299)
    rest = list(loop)
    assert (clip.delivered, clip.dropped) == (300, 0)
    # All was put into the queue at its time, and taken at the end.
    assert [frame.wait_seconds for frame in rest] == pytest.approx([(299 - n) / 25 for n in range(1, 300)], abs=1e-9)


def test_a_loop_that_is_too_slow_misses_the_oldest():
    clock, taken = Clock(), threading.Event()
    source = Capture(pictures(300), waits={1: taken})
    clip = Frames(source, "x", realtime=True, ahead=4, clock=clock, sleep=clock.sleep)
    loop = iter(clip)
    assert next(loop).number == 0
    taken.set()
    until(lambda: clip._over)
    assert [frame.number for frame in loop] == [296, 297, 298, 299]
    assert (clip.read, clip.delivered, clip.dropped) == (300, 5, 295)


def test_a_decoder_that_is_too_slow_is_not_waited_for():
    """Its frames come late, but they come."""
    clock = Clock()

    class Slow(Capture):
        def grab(self):
            clock.now += 0.1
            return super().grab()

    clip = Frames(Slow(pictures(5)), "x", realtime=True, ahead=9, clock=clock, sleep=clock.sleep)
    assert [frame.number for frame in clip] == list(range(5))
    assert clock.slept == []


def test_a_camera_never_waits():
    taken = threading.Event()
    clip = Frames(Capture(pictures(50), waits={1: taken}), "camera:0", live=True, ahead=2)
    loop = iter(clip)
    next(loop)
    taken.set()
    until(lambda: clip._over)
    assert [frame.number for frame in loop] == [48, 49]
    assert (clip.read, clip.delivered, clip.dropped) == (50, 3, 47)
    assert clip.trouble == "camera:0 gave no more frames: it may be unplugged"
    assert clip.promised is None


@settings(deadline=None, max_examples=150)
@given(
    good=st.lists(st.booleans(), max_size=40),
    takes=st.integers(0, 45),
    live=st.booleans(),
    realtime=st.booleans(),
    ahead=st.integers(1, 5),
)
def test_every_frame_is_delivered_or_counted(good, takes, live, realtime, ahead):
    capture = Capture([image if ok else None for ok, image in zip(good, pictures(40), strict=False)])
    clip = Frames(capture, "x", live=live, realtime=realtime, ahead=ahead, sleep=lambda seconds: None)
    numbers = []
    for frame in clip:
        numbers.append(frame.number)
        if len(numbers) >= takes:
            break
    clip.close()
    assert clip.delivered + clip.dropped == clip.read <= sum(good)
    assert len(numbers) == clip.delivered
    assert numbers == sorted(set(numbers))
    assert capture.released == 1
    if not live and not realtime:
        assert numbers == list(range(len(numbers)))
        assert clip.read <= clip.delivered + ahead + 1
        assert clip.delivered == min(max(takes, 1), sum(good))


def test_ends_that_are_no_end(clips):
    """Whatever ends a loop, the thread is joined and the capture released."""

    def leave(frame):
        raise ZeroDivisionError

    def interrupt(frame):
        raise KeyboardInterrupt

    for end in (leave, interrupt):
        capture = Capture(pictures(50))
        with pytest.raises((ZeroDivisionError, KeyboardInterrupt)), Frames(capture, "x") as clip:  # noqa: PT012
            for frame in clip:
                end(frame)
        assert not clip._thread.is_alive()
        assert (capture.released, clip.delivered) == (1, 1)
        assert clip.delivered + clip.dropped == clip.read
    for _ in (clip := Frames(Capture(pictures(50)), "x")):
        break
    assert not clip._thread.is_alive()
    closed = Frames(unused := Capture(pictures(50)), "x")
    closed.close()
    assert unused.released == 1
    with pytest.raises(CompanionError, match="can be read once"):
        next(iter(closed))


def test_a_source_that_gives_nothing_any_more():
    """The thread is inside OpenCV for ever; the loop is not."""
    plug = threading.Event()
    clip = Frames(Capture(pictures(3), waits={3: plug}), "camera:0", live=True, ahead=9, timeout=60)
    loop = iter(clip)
    for _ in range(3):
        next(loop)
    clip._timeout = 0.05
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(video, "LEAVE", 0.05)
        assert list(loop) == []
    assert clip.trouble == "camera:0 does not answer: its thread and the device are free when this program ends"
    assert clip._thread.daemon
    plug.set()
    clip._thread.join()
    assert clip.delivered + clip.dropped == clip.read


def test_a_source_that_pauses_too_long():
    capture = Capture(pictures(3))
    clip = Frames(capture, "camera:0", live=True, ahead=9, timeout=60)
    capture.waits = {3: clip._stop}
    loop = iter(clip)
    for _ in range(3):
        next(loop)
    clip._timeout = 0.05
    assert list(loop) == []
    assert clip.trouble == "camera:0 gave no frame for 0.05 s"


def test_an_error_in_the_thread_is_one_in_the_loop():
    class Broken(Capture):
        def retrieve(self):
            raise MemoryError("no room")

    with pytest.raises(CompanionError, match=r"^x cannot be read on: no room\.$"):
        list(Frames(Broken(pictures(3)), "x"))


def damaged(clips, tmp_path, suffix, begin, end):
    content = bytearray((clips / f"a.{suffix}").read_bytes())
    cut = slice(int(len(content) * begin), int(len(content) * end))
    content[cut] = np.random.RandomState(0).bytes(cut.stop - cut.start)
    (tmp_path / f"bad.{suffix}").write_bytes(content)
    return tmp_path / f"bad.{suffix}"


@pytest.mark.parametrize("suffix", ["mp4", "avi"])
def test_a_clip_damaged_in_the_middle_goes_on(clips, tmp_path, suffix, capfd):
    clip = frames(damaged(clips, tmp_path, suffix, 0.4, 0.5))
    seen = [column(frame.image) for frame in clip]
    assert 40 <= clip.read < 60
    assert seen[-1] >= 57  # the end was reached
    assert clip.trouble == f"{clip.name} promises 60 frames, and {clip.read} could be read"
    assert clip.delivered == clip.read
    assert capfd.readouterr() == ("", "")  # FFmpeg's own words are not ours


def test_a_clip_that_was_cut_off(clips, tmp_path):
    content = (clips / "a.avi").read_bytes()
    (tmp_path / "cut.avi").write_bytes(content[: len(content) // 2])
    clip = frames(tmp_path / "cut.avi")
    assert 20 <= len(list(clip)) <= 40
    assert clip.trouble == f"{tmp_path / 'cut.avi'} promises 60 frames, and {clip.read} could be read"


def test_frames_of_other_sizes_and_channels():
    sizes = [(4, 6, 3), (8, 2, 3), (5, 5), (5, 5, 1), (5, 5, 4)]
    images = [np.zeros(size, np.uint8) for size in sizes]
    images[4][:] = (10, 20, 30, 40)  # blue, green, red, opacity
    odd = [np.zeros((5, 5, 2), np.uint8), np.zeros((5, 5, 3), np.uint16), np.zeros((0, 5, 3), np.uint8), None]
    found = [frame.image for frame in Frames(Capture([*odd, *images]), "x")]
    assert [image.shape for image in found] == [(4, 6, 3), (8, 2, 3), (5, 5, 3), (5, 5, 3), (5, 5, 3)]
    assert found[4][0, 0].tolist() == [30, 20, 10]


def test_a_frame_with_too_many_pixels_is_left_out(monkeypatch):
    monkeypatch.setattr(video, "LARGEST_FRAME", 24)
    clip = Frames(Capture([*pictures(2), np.zeros((5, 5, 3), np.uint8)], count=3.0), "x")
    assert len(list(clip)) == 2
    assert clip.trouble == "x promises 3 frames, and 2 could be read"


@pytest.mark.parametrize("said", [0.0, float("nan"), float("inf"), -1.0, 90_000.0])
def test_a_clip_without_a_frame_rate(said):
    clip = Frames(Capture(pictures(3), fps=said, stamps=[float("nan")] * 3), "x")
    assert [frame.time for frame in clip] == pytest.approx([0, 0.04, 0.08])
    assert clip.rate == 25


def test_times_never_run_backwards():
    stamps = [3.0, 3.5, 3.2, -7.0, 3.9, float("inf")]  # nor begin anywhere but at 0
    times = [frame.time for frame in Frames(Capture(pictures(6), stamps=stamps), "x")]
    assert times == pytest.approx([0.0, 0.5, 0.54, 0.58, 0.9, 0.94])


@pytest.mark.parametrize(("count", "promised"), [(-1.0, None), (0.0, None), (2.0**40, None), (float("nan"), None)])
def test_an_absurd_number_of_frames_is_no_promise(count, promised):
    clip = Frames(Capture(pictures(2), count=count), "x")
    assert len(list(clip)) == 2
    assert (clip.promised, clip.trouble) == (promised, None)


def test_a_clip_filmed_upright_is_upright(clips, tmp_path):
    """A telephone writes how it was held into the track's header: here, turned by a quarter."""
    content = bytearray((clips / "a.mp4").read_bytes())
    matrix = content.find(b"tkhd") + 4 + 40
    content[matrix : matrix + 36] = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)
    (tmp_path / "turned.mp4").write_bytes(content)
    clip = frames(tmp_path / "turned.mp4")
    (plain, turned) = (next(iter(frames(path))).image for path in (clips / "a.mp4", tmp_path / "turned.mp4"))
    assert np.array_equal(turned, np.rot90(plain, -1))
    clip.close()


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("none.mp4", r"^there is no video none\.mp4\.$"),
        ("folder.mp4", r"^folder\.mp4 is no video file: name a single file\.$"),
        ("empty.mp4", r"^empty\.mp4 is damaged or no video: give an MP4, MOV, AVI, MKV or WebM file\.$"),
        ("text.mp4", r"^text\.mp4 is damaged or no video"),
        ("list.mp4", r"^list\.mp4 is damaged or no video"),
        ("cut.mp4", r"^cut\.mp4 is damaged or no video"),
        ("header.avi", r"^header\.avi is damaged or no video"),
        ("camera:x", r"^camera:x is no camera: number it from 0 to 99, as in camera:0\.$"),
        ("camera:-1", r"^camera:-1 is no camera"),
        ("camera:700", r"^camera:700 is no camera"),
        ("camera:", r"^camera: is no camera"),
        ("camera:99", r"^camera:99 cannot be opened: is it plugged in, and used by no other program\?$"),
    ],
)
def test_what_is_no_video_is_refused(clips, tmp_path, monkeypatch, source, says):
    monkeypatch.chdir(tmp_path)
    Path("folder.mp4").mkdir()
    Path("empty.mp4").touch()
    Path("text.mp4").write_text("no video")
    content = (clips / "a.mp4").read_bytes()
    Path("whole.mp4").write_bytes(content)
    Path("list.mp4").write_text("ffconcat version 1.0\nfile whole.mp4\n")  # of other files, which FFmpeg would open
    Path("cut.mp4").write_bytes(content[: len(content) // 2])
    Path("header.avi").write_bytes((clips / "a.avi").read_bytes()[:40])
    with pytest.raises(CompanionError, match=says):
        frames(source)


def test_a_name_that_looks_like_an_address(clips, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("concat:a|b.avi").write_bytes((clips / "a.avi").read_bytes())
    assert len(list(frames("concat:a|b.avi"))) == 60


@pytest.mark.skipif(sys.platform != "linux", reason="names are text here")
def test_a_name_that_is_no_text(tmp_path):
    """At which OpenCV would end this process."""
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.avi")
    for call in (lambda: frames(path), lambda: write_video(path, pictures(2))):
        with pytest.raises(CompanionError, match=r"^the name '.*\\udcff\.avi' is no text: rename it\.$"):
            call()


def test_names_in_other_scripts(clips, tmp_path):
    (tmp_path / "猫 ü.avi").write_bytes((clips / "a.avi").read_bytes())
    assert watch(tmp_path / "猫 ü.avi", nothing, out=tmp_path / "drawn 猫 ü.mp4").delivered == 60
    assert len(list(frames(tmp_path / "drawn 猫 ü.mp4"))) == 60


def test_a_clip_with_too_many_pixels(clips, monkeypatch):
    monkeypatch.setattr(video, "LARGEST_FRAME", 96 * 128 - 1)
    with pytest.raises(CompanionError, match=r"a\.avi has frames of 128 × 96 pixels, too many: make them smaller\.$"):
        frames(clips / "a.avi")


def test_frames_that_claim_900_megapixels(clips, tmp_path):
    """In the picture's own header, not in the clip's: in all frames, in the first one. And only we say something."""
    content = (clips / "a.avi").read_bytes()
    start = re.escape(b"\xff\xc0\x00\x11\x08") + struct.pack(">2H", 96, 128)
    for count in (0, 1):
        huge = re.sub(start, b"\xff\xc0\x00\x11\x08" + struct.pack(">2H", 30_000, 30_000), content, count=count)
        (tmp_path / f"{count}.avi").write_bytes(huge)
    program = f"""
import resource, sys
from companion.detect import frames
assert "cv2" not in sys.modules
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in ("0.avi", "1.avi", "camera:99"):
    try:
        clip = frames(name if name[0] == "c" else {str(tmp_path)!r} + "/" + name)
        print(len(list(clip)), clip.trouble)
    except ValueError as error:
        print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    *said, camera, mebibytes = done.stdout.splitlines()
    for line in said:
        assert "too many" in line or "could be read" in line or "no video" in line
    assert camera.startswith("camera:99 cannot be opened")
    assert int(mebibytes) < 300
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ahead": 0}, r"ahead is 0: give a whole number from 1 to 100\."),
        ({"ahead": True}, r"ahead is True"),
        ({"timeout": 0}, r"timeout is 0: give seconds, more than 0\."),
        ({"timeout": float("nan")}, r"timeout is nan"),
    ],
)
def test_options_out_of_range(clips, options, says):
    with pytest.raises(CompanionError, match=says):
        frames(clips / "a.avi", **options)


def test_without_opencv(clips, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    says = r'^video needs OpenCV: pip install -c constraints\.txt -e "\.\[detect\]"\.$'
    for call in (lambda: frames(clips / "a.avi"), lambda: write_video("x.avi", pictures(2))):
        with pytest.raises(CompanionError, match=says):
            call()


def test_what_is_a_video():
    assert [is_video(name) for name in ("a.MP4", "b.avi", "camera:0", "c.webm", "d.png", "folder", "e.gif")] == [
        *[True] * 4,
        *[False] * 3,
    ]


def test_watching_a_clip(clips, tmp_path):
    seen = []
    report = watch(clips / "a.mp4", one, out=tmp_path / "out.mp4", on_frame=lambda *both: seen.append(both))
    assert (report.read, report.delivered, report.dropped, report.promised) == (60, 60, 0, 60)
    assert (report.trouble, report.interrupted) == (None, False)
    assert [frame.number for frame, _ in seen] == list(range(60))
    assert all(found.labels == ("x",) for _, found in seen)
    assert list(report.stages) == ["read", "wait", "detect", "draw", "write"]
    assert all(len(stage.samples) == 60 for stage in report.stages.values())
    assert report.fps == pytest.approx(60 / report.seconds)
    assert sum(sum(report.stages[name].samples) for name in ("detect", "draw", "write")) < report.seconds
    drawn = [frame.image for frame in frames(tmp_path / "out.mp4")]
    assert len(drawn) == 60
    # Compressed, but nearer to what was drawn than the frame itself is.
    for image, (frame, found) in zip(drawn, seen, strict=True):
        expected = np.asarray(detect.draw(frame.image, found)).astype(int)
        assert np.abs(image - expected).mean() < 0.5 * np.abs(frame.image - expected).mean() + 4
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]


def test_a_clip_with_dropped_frames_is_as_long_as_the_first(tmp_path):
    """The last frame is never dropped."""
    write_video(tmp_path / "fast.avi", datasets.digit_clip(size=64).frames, rate=400)
    report = watch(
        tmp_path / "fast.avi", nothing, out=tmp_path / "out.avi", on_frame=lambda *_: time.sleep(0.02), realtime=True
    )
    assert report.dropped > 0
    assert report.delivered + report.dropped == report.read == 100
    assert len(list(frames(tmp_path / "out.avi"))) == 100


def test_stages_by_hand():
    stage = detect.Stage((3.0, 1.0, 2.0))
    assert (stage.median, stage.p95) == (2.0, pytest.approx(2.9))
    report = detect.Report(7, 4, 3, 9, 2.0, {"read": stage}, "x promises 9 frames, and 7 could be read", False)
    assert report.fps == 2.0
    assert str(report).splitlines() == [
        "7 frames read, 4 looked at, 3 dropped; 2.0 a second",
        "stage  median   p95",
        "read   2.000 s  2.900 s",
        "x promises 9 frames, and 7 could be read.",
    ]


def test_without_a_file_nothing_is_drawn(clips):
    assert list(watch(clips / "a.avi", nothing).stages) == ["read", "wait", "detect"]


def test_an_error_leaves_no_file(clips, tmp_path):
    (tmp_path / "out.avi").write_text("the last one")

    def fail(frame, found):
        if frame.number == 30:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        watch(clips / "a.avi", nothing, out=tmp_path / "out.avi", on_frame=fail)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("out.avi", "the last one")]


def test_ctrl_c_keeps_what_was_finished(clips, tmp_path):
    def interrupt(frame, found):
        if frame.number == 30:
            raise KeyboardInterrupt

    report = watch(clips / "a.avi", nothing, out=tmp_path / "out.avi", on_frame=interrupt)
    assert (report.interrupted, report.delivered) == (True, 31)
    assert report.delivered + report.dropped == report.read
    assert len(list(frames(tmp_path / "out.avi"))) == 31


def test_ctrl_c_when_a_frame_is_written_and_not_yet_counted(clips, tmp_path, monkeypatch):
    class Interrupted:
        """OpenCV's writer, with a signal that arrives at the worst moment."""

        def __init__(self):
            self.real, self.count = writer(), 0

        def write(self, image):
            self.real.write(image)
            self.count += 1
            if self.count == 20:
                raise KeyboardInterrupt

        def __getattr__(self, name):
            return getattr(self.real, name)

    writer = cv2.VideoWriter
    monkeypatch.setattr(cv2, "VideoWriter", Interrupted)
    report = watch(clips / "a.avi", nothing, out=tmp_path / "out.avi")
    assert report.interrupted
    assert len(list(frames(tmp_path / "out.avi"))) == 20


def test_a_pause_of_the_clip_itself_is_no_silence():
    """At its frame rate, a frame that is due in an hour is awaited, however short the patience."""
    awaited, due = [], threading.Event()

    def sleep(seconds):
        awaited.append(seconds)
        due.wait(0.3)

    capture = Capture(pictures(3), stamps=[0, 3600, 3600.04])
    clip = Frames(capture, "x", realtime=True, timeout=0.05, clock=lambda: 0.0, sleep=sleep)
    assert [frame.time for frame in clip] == [0, 3600, 3600.04]
    assert awaited == [3600, 3600.04]
    assert clip.trouble is None


def test_ctrl_c_before_the_first_frame(clips, tmp_path):
    def interrupt(image):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        watch(clips / "a.avi", interrupt, out=tmp_path / "out.avi")
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_reader_of_frames_is_not_one_of_the_file(clips, tmp_path):
    def fail(frame, found):
        raise BrokenPipeError("nobody listens")

    with pytest.raises(BrokenPipeError):
        watch(clips / "a.avi", nothing, out=tmp_path / "out.avi", on_frame=fail)


def test_a_clip_without_a_frame_is_refused(clips, tmp_path, monkeypatch):
    monkeypatch.setattr(video, "_rgb", lambda image: None)
    with pytest.raises(CompanionError, match=r"a\.avi promises 60 frames, and 0 could be read\.$"):
        watch(clips / "a.avi", nothing, out=tmp_path / "out.avi")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", ["mp4", "avi"])
def test_what_is_written_can_be_read(tmp_path, suffix):
    """Odd sizes lose a row and a column; an image of another size is stretched to the first one's."""
    images = [np.full((97, 161, 3), (200, 100, 10 * n), np.uint8) for n in range(10)]
    images[5] = images[5][:50, :60]
    write_video(tmp_path / f"x.{suffix}", iter(images), 12.5)
    clip = frames(tmp_path / f"x.{suffix}")
    assert clip.rate == 12.5
    found = np.stack([frame.image for frame in clip])
    assert found.shape == (10, 96, 160, 3)
    expected = np.stack([np.full((96, 160, 3), (200, 100, 10 * n)) for n in range(10)])
    assert np.abs(found - expected).max() < 12


@pytest.mark.parametrize(
    ("name", "images", "rate", "says"),
    [
        ("x.gif", pictures(2), 25, r"^.*x\.gif must end in \.mp4 or \.avi\.$"),
        ("x.mp4", [], 25, r"^cannot write .*x\.mp4: there are no images\.$"),
        ("x.mp4", [np.zeros((1, 1, 3), np.uint8)], 25, r"x\.mp4: there is no video of 1 × 1 pixels\.$"),
        ("x.mp4", [np.zeros((4, 4), np.uint8)], 25, r"must be uint8 arrays \[H, W, 3\]\.$"),
        ("x.mp4", [torch.zeros(3, 4, 4)], 25, r"must be uint8 arrays"),
        ("x.mp4", pictures(2), 0, r"^rate is 0: give 0\.1 to 1000 frames per second\.$"),
        ("x.mp4", pictures(2), float("nan"), r"^rate is nan"),
        ("none/x.mp4", pictures(2), 25, r"^cannot write .*x\.mp4: No such file or directory\.$"),
    ],
)
def test_a_video_that_cannot_be_written(tmp_path, name, images, rate, says):
    with pytest.raises(CompanionError, match=says):
        write_video(tmp_path / name, images, rate)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_no_half_video(tmp_path):
    """OpenCV's writer says nothing: no file of this process may grow beyond 200 kB."""
    program = f"""
import resource, numpy as np
from companion.detect import write_video
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
random = np.random.RandomState(0)
for name in ("x.mp4", "x.avi"):
    try:
        noise = (random.randint(0, 255, (240, 320, 3), np.uint8) for _ in range(99))
        write_video({str(tmp_path)!r} + "/" + name, noise)
    except ValueError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"(cannot write .*x\.(mp4|avi): .*\.\n){2}", done.stdout), done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not (MODELS / "yolov5n.onnx").exists(), reason="the official YOLOv5n is not here")
def test_red_comes_first_for_the_official_network(tmp_path):
    """With blue first it would miss the bus."""
    photo = (detect.read_image(MODELS / "bus.jpg") * 255).round().byte().permute(1, 2, 0).numpy()
    write_video(tmp_path / "bus.avi", [photo] * 2)
    seen = []
    with engines.load(MODELS / "yolov5n.onnx", threads=1) as engine:
        watch(tmp_path / "bus.avi", Detector(engine, confidence=0.4), on_frame=lambda frame, found: seen.append(found))
    assert [each["label"] for each in seen[0].to_json()] == ["person", "person", "person", "bus"]
    np.testing.assert_allclose(seen[0].scores, [0.824, 0.816, 0.676, 0.525], atol=0.06)  # compressed once more


@pytest.mark.stress
def test_memory_does_not_grow_with_the_clip(tmp_path):
    """10,000 frames of 320 × 240, 230 kB each: had only one in a hundred stayed, there were 23 MB more."""
    write_video(tmp_path / "long.avi", (np.full((240, 320, 3), n % 250, np.uint8) for n in range(10_000)))
    program = f"""
import resource
from pathlib import Path
from companion.detect import frames
sizes = []
for frame in frames({str(tmp_path / "long.avi")!r}):
    if frame.number % 1000 == 999:
        sizes.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize())
print(sizes[-1] - sizes[0])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 8 * 2**20


@pytest.mark.stress
def test_clips_damaged_at_random(tmp_path):
    """Cut off, or bytes changed, often in the header: frames, a sentence, or both; in a process that might crash."""
    for suffix in ("mp4", "avi"):
        write_video(tmp_path / f"a.{suffix}", datasets.digit_clip(frames=40, size=64).frames)
    program = f"""
import random
from pathlib import Path
from companion import CompanionError
from companion.detect import frames
folder, random, outcomes = Path({str(tmp_path)!r}), random.Random(0), dict(refused=0, whole=0, part=0)
for trial in range(600):
    source = folder / ("a.mp4" if trial % 2 else "a.avi")
    content = bytearray(source.read_bytes())
    if random.random() < 0.3:
        del content[random.randrange(len(content)):]
    else:
        for _ in range(random.choice((1, 3, 30, 300))):
            content[random.randrange(random.choice((2000, len(content))))] = random.randrange(256)
        if random.random() < 0.3:  # an MP4's index is at its end
            for _ in range(20):
                content[-random.randrange(1, 2000)] = random.randrange(256)
    bad = folder / f"bad{{source.suffix}}"
    bad.write_bytes(content)
    try:
        clip = frames(bad)
        seen = len(list(clip))
    except CompanionError:
        outcomes["refused"] += 1
        continue
    assert seen == clip.read == clip.delivered, trial
    outcomes["part" if clip.trouble else "whole"] += 1
print(min(outcomes.values()))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=200)
    assert int(done.stdout) > 50
    assert done.stderr == ""
