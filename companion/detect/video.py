"""Video: the frames of a clip or a camera, read ahead by a thread, and what a detector finds in them."""

import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Self

import numpy as np

from companion import files
from companion.detect.detector import Detections, Detector
from companion.detect.drawing import draw
from companion.errors import CompanionError
from companion.units import format_seconds, format_table

SUFFIXES = {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm"}
CODECS = {".mp4": "mp4v", ".avi": "MJPG"}  # what OpenCV's wheels can write on every system
STAGES = ("read", "wait", "detect", "draw", "write")

AHEAD = 4  # frames that may wait
PATIENCE = 10.0  # seconds without a frame after which nobody expects one; OpenCV itself waits so long for a camera
LEAVE = 2.0  # seconds that a thread gets to end
FAILURES = 100  # in a row: after so many there is no picture further on
RATE = 25.0  # frames a second, where a clip names none
LARGEST_FRAME = 2**30 // 4 // 3  # pixels: as Pillow's limit for images
KEPT = 10_000  # latencies of a stage, the last ones: a camera may run for days


@dataclass(frozen=True, eq=False)
class Frame:
    """A picture of a video."""

    image: np.ndarray
    """Uint8 [H, W, 3], red first, upright; its size may change from frame to frame."""
    number: int
    """From 0; those dropped are counted."""
    time: float
    """Seconds since the first one: by the clip's time stamps, by the clock for a camera."""
    read_seconds: float
    """To read and decode it."""
    wait_seconds: float
    """That it lay in the queue."""


class Frames:
    """The frames of a video in order, to be iterated over once; `frames` opens it.

    A thread reads ahead into a queue that holds a few frames. Where it may not wait (a camera, or a clip at its frame
    rate) the oldest frame in a full queue is dropped. After the loop has ended, by itself or not,
    ``delivered + dropped == read``.

    A loop that ends stops the thread; one that an error ends does so when Python forgets the error, which in a notebook
    may be never: a ``with`` block does it at once.

    Args:
        capture: what has OpenCV's ``grab``, ``retrieve``, ``get`` and ``release``.
        name: for messages.
        live: it comes at its own pace, as a camera does.
        clock: seconds.
        sleep: waits so many seconds, or until the frames are closed.
    """

    def __init__(
        self,
        capture: Any,
        name: str,
        *,
        live: bool = False,
        realtime: bool = False,
        ahead: int = AHEAD,
        timeout: float = PATIENCE,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        cv2 = opencv()
        self.name = name
        self.rate = _rate(capture.get(cv2.CAP_PROP_FPS))
        """Frames per second that the clip names; 25 where it names none."""
        count = capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self.promised = round(count) if not live and 0 < count < 2**31 else None
        """Frames that the file says it has."""
        self.read = self.delivered = self.dropped = 0
        self.trouble: str | None = None
        """Why there are fewer frames than promised; None if all is well."""
        self._capture, self._live = capture, live
        self._paced, self._drops = realtime and not live, realtime or live
        self._ahead, self._timeout, self._clock = ahead, timeout, clock
        self._stop = threading.Event()
        self._sleep = sleep or self._stop.wait
        self._changed = threading.Condition()
        self._queue: deque[tuple[np.ndarray, int, float, float, float]] = deque()
        self._over = self._early = self._left = False
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None

    def __iter__(self) -> Iterator[Frame]:
        if self._thread is not None or self._stop.is_set():
            raise CompanionError("the frames of a video can be read once: open it again.")
        self._thread = threading.Thread(target=self._read_all, name=f"frames of {self.name}", daemon=True)
        self._thread.start()
        try:
            while (frame := self._take()) is not None:
                yield frame
        finally:
            self.close()

    def close(self) -> None:
        """Stop reading; what waits is dropped."""
        self._stop.set()
        with self._changed:
            self.dropped += len(self._queue)
            self._queue.clear()
            self._changed.notify_all()
        if self._thread is None:
            self._capture.release()
        elif not self._left:
            self._thread.join(LEAVE)
            if self._thread.is_alive():  # inside OpenCV, from where nothing can call it back
                self._left = True
                self.trouble = f"{self.name} does not answer: its thread and the device are free when this program ends"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take(self) -> Frame | None:
        with self._changed:
            while not self._changed.wait_for(lambda: self._queue or self._over, self._timeout):
                if not self._early:
                    self.trouble = f"{self.name} gave no frame for {self._timeout:g} s"
                    return None
            if not self._queue:
                if self._error is not None:
                    raise CompanionError(f"{self.name} cannot be read on: {self._error}.") from self._error
                return None
            image, number, at, seconds, since = self._queue.popleft()
            self.delivered += 1
            self._changed.notify_all()
        return Frame(image, number, at, seconds, self._clock() - since)

    def _read_all(self) -> None:
        """What the thread does; it alone touches the capture, which two at a time may not."""
        try:
            self._read_on()
        except Exception as error:
            self._error = error
        finally:
            self._capture.release()
            with self._changed:
                if not self._stop.is_set():
                    if self._live:
                        self.trouble = f"{self.name} gave no more frames: it may be unplugged"
                    elif self.promised is not None and self.read < self.promised:
                        self.trouble = f"{self.name} promises {self.promised} frames, and {self.read} could be read"
                self._over = True
                self._changed.notify_all()

    def _read_on(self) -> None:
        failures, last, start, first = 0, -1 / self.rate, 0.0, 0.0
        while failures < FAILURES and not self._stop.is_set():
            before = self._clock()
            image, stamp = self._decode()
            now = self._clock()
            if image is None:  # a damaged packet, an odd picture, or the end
                failures += 1
                continue
            if self.read == 0:
                start, first = now, stamp if math.isfinite(stamp) else 0.0
            failures, since = 0, stamp - first
            # Stamps may be missing, stand still or run backwards.
            last = now - start if self._live else since if last < since < math.inf else last + 1 / self.rate
            if self._paced and (early := start + last - now) > 0:
                self._early = True  # the silence until then is ours
                self._sleep(early)
                self._early = False
            self._offer(image, last, now - before)

    def _decode(self) -> tuple[np.ndarray | None, float]:
        """The next picture, or None, and its time stamp."""
        cv2 = opencv()
        try:
            if not self._capture.grab():
                return None, 0.0
            stamp = self._capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
            whole, image = self._capture.retrieve()
        except cv2.error:
            return None, 0.0
        return (_rgb(image) if whole else None), stamp

    def _offer(self, image: np.ndarray, at: float, seconds: float) -> None:
        with self._changed:
            self.read += 1
            if self._drops:
                if len(self._queue) == self._ahead:
                    self._queue.popleft()
                    self.dropped += 1
            else:
                self._changed.wait_for(lambda: len(self._queue) < self._ahead or self._stop.is_set())
            if self._stop.is_set():
                self.dropped += 1
                return
            self._queue.append((image, self.read - 1, at, seconds, self._clock()))
            self._changed.notify_all()


@dataclass(frozen=True)
class Stage:
    """How long one stage took for each frame, in seconds: of the last 10,000 frames."""

    samples: tuple[float, ...] = field(repr=False)

    @property
    def median(self) -> float:
        return float(np.median(self.samples))

    @property
    def p95(self) -> float:
        return float(np.percentile(self.samples, 95))


@dataclass(frozen=True)
class Report:
    """How a video went; printed, it is a table of the stages."""

    read: int
    """Frames; each was delivered or dropped."""
    delivered: int
    """To the detector."""
    dropped: int
    promised: int | None
    """Frames that the file says it has."""
    seconds: float
    """From the start to the end of the last frame's work."""
    stages: dict[str, Stage]
    """``read`` and decode (which runs beside the others), ``wait`` in the queue, ``detect``, and with a file to write
    ``draw`` and ``write``."""
    trouble: str | None
    """Why there are fewer frames than promised; None if all is well."""
    interrupted: bool
    """By Ctrl-C."""

    @property
    def fps(self) -> float:
        """Frames per second that the detector saw."""
        return self.delivered / self.seconds

    def __str__(self) -> str:
        counts = f"{self.read} frames read, {self.delivered} looked at, {self.dropped} dropped"
        rows = [(name, format_seconds(s.median), format_seconds(s.p95)) for name, s in self.stages.items()]
        lines = [f"{counts}; {self.fps:.1f} a second", format_table([("stage", "median", "p95"), *rows])]
        return "\n".join([*lines, *([f"{self.trouble}."] if self.trouble else [])])


def frames(
    source: str | os.PathLike[str], *, realtime: bool = False, ahead: int = AHEAD, timeout: float = PATIENCE
) -> Frames:
    """The frames of a clip or a camera: ``for frame in frames("clip.mp4"): …``.

    Every frame of a clip comes, however long the loop takes for one. At its frame rate (``realtime``), as always with a
    camera, a loop that is too slow misses frames: the oldest that wait are dropped and counted. Damaged frames are left
    out where the decoder can go on; ``trouble`` then says how many there were of how many.

    Args:
        source: an MP4, MOV, AVI, MKV or WebM file, or ``camera:0`` for the first camera.
        realtime: release each frame at its time.
        ahead: how many frames may wait, at most. With a camera fewer are younger.
        timeout: seconds without a frame after which the video has ended.

    Raises:
        CompanionError: no such file or camera, no video, too many pixels, an argument out of range, no OpenCV.
    """
    if isinstance(ahead, bool) or not isinstance(ahead, int) or not 1 <= ahead <= 100:
        raise CompanionError(f"ahead is {ahead!r}: give a whole number from 1 to 100.")
    if not 0 < timeout < threading.TIMEOUT_MAX:
        raise CompanionError(f"timeout is {timeout!r}: give seconds, more than 0.")
    name, live = str(source), is_camera(source)
    capture = _open_camera(name) if live else _open_clip(Path(source))
    return Frames(capture, name, live=live, realtime=realtime, ahead=ahead, timeout=timeout)


def watch(
    source: str | os.PathLike[str],
    detector: Detector,
    *,
    out: str | os.PathLike[str] | None = None,
    on_frame: Callable[[Frame, Detections], object] | None = None,
    realtime: bool = False,
    ahead: int = AHEAD,
    timeout: float = PATIENCE,
) -> Report:
    """Detect objects in each frame of a clip or a camera.

    Ctrl-C ends it as the end of the clip does: there is a report, and ``out`` holds the frames until then.

    Args:
        source: as for `frames`, which also explains ``realtime``, ``ahead`` and ``timeout``.
        detector: gets every frame that is not dropped.
        out: an .mp4 or .avi file for the frames with what was found drawn in, at the clip's frame rate. A frame also
            stands for those before it that were dropped, so the two are equally long.
        on_frame: called with each frame and what was found; an error in it ends everything, and leaves no ``out``.

    Raises:
        CompanionError: as `frames` and `write_video`, or not one frame came.
    """
    times: dict[str, deque[float]] = {name: deque(maxlen=KEPT) for name in STAGES}

    def timed(stage: str, function: Callable[..., Any], *arguments: Any) -> Any:
        start = time.perf_counter()
        result = function(*arguments)
        times[stage].append(time.perf_counter() - start)
        return result

    interrupted, last, start = False, -1, time.perf_counter()
    with ExitStack() as stack:
        if out is not None:
            _codec(Path(out))
        clip = stack.enter_context(frames(source, realtime=realtime, ahead=ahead, timeout=timeout))
        write = None if out is None else stack.enter_context(_writing(Path(out), clip.rate))
        try:
            for frame in clip:
                times["read"].append(frame.read_seconds)
                times["wait"].append(frame.wait_seconds)
                found = timed("detect", detector, frame.image)
                if write is not None:
                    timed("write", write, timed("draw", _drawn, frame.image, found), frame.number - last)
                    last = frame.number
                if on_frame is not None:
                    on_frame(frame, found)
        except KeyboardInterrupt:
            if not times["write" if write else "detect"]:
                raise  # there is nothing to keep
            interrupted = True
        clip.close()
        seconds = time.perf_counter() - start
        if clip.delivered == 0 and not interrupted:
            raise CompanionError(f"{clip.trouble or f'{source} holds no frame'}.")
    stages = {name: Stage(tuple(samples)) for name, samples in times.items() if samples}
    return Report(clip.read, clip.delivered, clip.dropped, clip.promised, seconds, stages, clip.trouble, interrupted)


def write_video(path: str | os.PathLike[str], images: Iterable[np.ndarray], rate: float = RATE) -> None:
    """Write a video file, whole or not at all.

    Args:
        path: ends in .mp4 (MPEG-4) or .avi (Motion JPEG). An odd last row or column is cut off, as both formats want.
        images: uint8 [H, W, 3], red first; the first one's size is the video's.
        rate: frames per second.

    Raises:
        CompanionError: another suffix, no images, a file that cannot be written, a disk that is full, no OpenCV.
    """
    with _writing(Path(path), rate) as write:
        for image in images:
            write(image)


def is_camera(source: str | os.PathLike[str]) -> bool:
    """Whether ``source`` names a camera rather than a file."""
    return str(source).startswith("camera:")


def is_video(source: str | os.PathLike[str]) -> bool:
    """Whether ``source`` names a camera or a video file; images are the rest."""
    return is_camera(source) or Path(source).suffix.lower() in SUFFIXES


def opencv() -> ModuleType:
    """OpenCV, silent.

    Raises:
        CompanionError: it is not installed.
    """
    # Both write to stderr past Python; what matters is said by us.
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    try:
        import cv2
    except ImportError as error:
        raise CompanionError('video needs OpenCV: pip install -c constraints.txt -e ".[detect]".') from error
    return cv2


def _open_camera(name: str) -> Any:
    cv2 = opencv()
    number = name.removeprefix("camera:")
    if not (number.isascii() and number.isdigit() and len(number) <= 2):  # OpenCV reads more out of larger numbers
        raise CompanionError(f"{name} is no camera: number it from 0 to 99, as in camera:0.")
    capture = cv2.VideoCapture(int(number))
    if not capture.isOpened():
        raise CompanionError(f"{name} cannot be opened: is it plugged in, and used by no other program?")
    return capture


def _open_clip(path: Path) -> Any:
    cv2 = opencv()
    _check_name(path)
    if not path.exists():
        raise CompanionError(f"there is no video {path}.")
    if not path.is_file():
        raise CompanionError(f"{path} is no video file: name a single file.")
    try:
        with path.open("rb") as file:
            known = _is_clip(file.read(12))
    except OSError as error:
        raise CompanionError(f"cannot read {path}: {error.strerror or error}.") from error
    # FFmpeg would also open lists of other files and addresses; and a relative name may look like a protocol.
    capture = cv2.VideoCapture(str(path.resolve()), cv2.CAP_FFMPEG) if known else None
    if capture is None or not capture.isOpened():
        raise CompanionError(f"{path} is damaged or no video: give an MP4, MOV, AVI, MKV or WebM file.")
    width, height = (capture.get(side) for side in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
    if width * height > LARGEST_FRAME:
        capture.release()
        raise CompanionError(f"{path} has frames of {width:.0f} × {height:.0f} pixels, too many: make them smaller.")
    return capture


def _is_clip(start: bytes) -> bool:
    """Whether these are the first bytes of an MP4 or MOV, AVI, MKV or WebM file."""
    return (
        start[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
        or (start[:4] == b"RIFF" and start[8:12] == b"AVI ")
        or start[:4] == b"\x1a\x45\xdf\xa3"
    )


def _rate(said: float) -> float:
    return said if 0 < said <= 1000 else RATE  # 0, NaN, and 90,000 where a clip has a clock but no rate


def _rgb(image: np.ndarray) -> np.ndarray | None:
    """Uint8 [H, W, 3], red first, of what OpenCV decoded: blue first, gray, or with transparency; None of others."""
    cv2 = opencv()
    if image is None or image.dtype != np.uint8 or image.ndim not in (2, 3) or image.size == 0:
        return None
    if image.shape[0] * image.shape[1] > LARGEST_FRAME:
        return None
    channels = 1 if image.ndim == 2 else image.shape[2]
    ways = {1: cv2.COLOR_GRAY2RGB, 3: cv2.COLOR_BGR2RGB, 4: cv2.COLOR_BGRA2RGB}
    return cv2.cvtColor(image, ways[channels]) if channels in ways else None


def _drawn(image: np.ndarray, found: Detections) -> np.ndarray:
    return np.asarray(draw(image, found))


def _check_name(path: Path) -> None:
    """OpenCV ends the process at names that are no text."""
    try:
        str(path.resolve()).encode()
    except UnicodeEncodeError:
        raise CompanionError(f"the name {str(path)!a} is no text: rename it.") from None


def _codec(path: Path) -> str:
    _check_name(path)
    codec = CODECS.get(path.suffix.lower())
    if codec is None:
        raise CompanionError(f"{path} must end in {' or '.join(CODECS)}.")
    return codec


@contextmanager
def _writing(path: Path, rate: float) -> Iterator[Callable[..., None]]:
    """Gives a function that adds an image, once or several times, to the video ``path``.

    The video is there when the block has ended well.
    """
    cv2 = opencv()
    codec = cv2.VideoWriter_fourcc(*_codec(path))
    if not 0.1 <= rate <= 1000:
        raise CompanionError(f"rate is {rate}: give 0.1 to 1000 frames per second.")
    writer, written, size = cv2.VideoWriter(), 0, (0, 0)

    def write(image: np.ndarray, times: int = 1) -> None:
        nonlocal written, size
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise CompanionError("the images of a video must be uint8 arrays [H, W, 3].")
        if not writer.isOpened():
            size = image.shape[1], image.shape[0]
            if not writer.open(str(part), cv2.CAP_FFMPEG, codec, rate, size):
                raise CompanionError(f"cannot write {path}: there is no video of {size[0]} × {size[1]} pixels.")
        image = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
        image = image if image.shape[1::-1] == size else cv2.resize(image, size)
        for _ in range(times):
            writer.write(image)
        written += times

    with files.replacing_named(path) as part:
        try:
            yield write
        finally:
            writer.release()
        if not written:
            raise CompanionError(f"cannot write {path}: there are no images.")
        # The writer does not say when the disk is full; the file does.
        check = cv2.VideoCapture(str(part), cv2.CAP_FFMPEG)
        found = check.get(cv2.CAP_PROP_FRAME_COUNT)
        check.release()
        if found < written:  # one more, if Ctrl-C came when it was written and not yet counted
            raise CompanionError(f"cannot write {path}: only {max(0, int(found))} of {written} frames are in it.")
