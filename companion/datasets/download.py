"""Downloads that are either whole and right or leave nothing."""

import hashlib
import shutil
import tarfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException, HTTPResponse, responses
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.error import HTTPError, URLError

import companion
from companion.datasets import ag_news, camvid, cifar10
from companion.datasets.store import archive_name, data_folder, manifest
from companion.errors import CompanionError
from companion.files import sha256, working_path
from companion.progress import progress_bar

BLOCK = 64 * 1024  # bytes read at a time
BROUGHT = {"camvid": camvid, "ag_news": ag_news}  # by the reader: there is nothing to download


def get(name: str, *, url: str | None = None, timeout: float = 30.0, progress: bool = True) -> Path:
    """Download a data set into `data_folder`, unless a good copy is there.

    The archive is checked for its size and SHA-256 before anything of it is opened, and unpacked beside
    its place before it is moved there. Whoever has the archive already (from a colleague, on a stick)
    puts it into `data_folder`: then it is checked and unpacked, and nothing is downloaded.

    Args:
        name: ``cifar10``; or ``camvid`` or ``ag_news``, which cannot be downloaded: if it is not there, the error says
            what to put where. The other data sets need no download.
        url: another place that has the same file.
        timeout: give up when the server sends nothing for so many seconds.
        progress: show a progress bar where somebody watches.

    Returns:
        Where the data set lies.

    Raises:
        CompanionError: nothing to download under that name; a timeout out of range; the server cannot be
            reached, refuses, hangs, breaks off, or has another file; the disk is full or read-only. Nothing
            is left behind.
    """
    if not 0 < timeout <= 86_400:
        raise CompanionError(f"timeout is {timeout:g}: give seconds, more than 0 and at most a day.")
    downloads = manifest()["downloads"]
    if name in BROUGHT:
        return BROUGHT[name].locate()
    if name not in downloads:
        raise CompanionError(f"{name!r} is nothing to download: choose {', '.join(downloads)}.")
    if (present := cifar10.find()) is not None:
        trouble = cifar10.trouble(present)
        if trouble is None:
            return present
        if present.name != cifar10.BATCHES:
            raise CompanionError(f"{present} is damaged ({trouble}): remove it first.")
    wanted = downloads[name]
    folder = data_folder()
    archive = folder / archive_name(wanted)
    target = folder / cifar10.BATCHES
    with _working_folder(target) as work:
        if archive.is_file():
            if sha256(archive) != wanted["sha256"]:
                raise CompanionError(f"{archive} has the wrong checksum: remove it.")
            with archive.open("rb") as file:
                _unpack(file, cifar10.BATCHES, work / target.name)
        else:
            with (work / archive.name).open("w+b") as file:
                _download(url or wanted["url"], file, wanted, timeout, progress)
                file.seek(0)  # the bytes that were checked, whatever their name stands for by now
                _unpack(file, cifar10.BATCHES, work / target.name)
        shutil.rmtree(target, ignore_errors=True)  # a damaged one
        (work / target.name).rename(target)
    return target


@contextmanager
def _working_folder(target: Path) -> Iterator[Path]:
    """A folder beside ``target``, of this process alone, that is gone at the end, whatever happened."""
    work = working_path(target)
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir(parents=True)
        yield work
    except OSError as error:
        raise CompanionError(f"cannot write into {target.parent}: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _download(url: str, file: IO[bytes], wanted: dict[str, Any], timeout: float, progress: bool) -> None:
    size, digest, received = wanted["bytes"], hashlib.sha256(), 0
    with (
        _open(url, timeout) as response,
        progress_bar(show=progress, total=size, unit="B", unit_scale=True, desc=Path(file.name).name) as bar,
    ):
        if response.length not in (None, size):  # None: the server does not say
            raise CompanionError(f"{url} has another file: {response.length:,} bytes instead of {size:,}.")
        while block := _read(url, response, timeout, f"after {received:,} of {size:,} bytes"):
            received += len(block)
            if received > size:
                raise CompanionError(f"{url} has another file: more than the {size:,} bytes expected.")
            digest.update(block)
            file.write(block)
            bar.update(len(block))
    if received < size:
        raise CompanionError(f"{url} broke off after {received:,} of {size:,} bytes: try again.")
    if digest.hexdigest() != wanted["sha256"]:
        raise CompanionError(f"{url} has another file: its checksum is wrong.")


def _open(url: str, timeout: float) -> HTTPResponse:
    # urllib.request.urlopen would also open files and FTP, and follow redirects to the latter.
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    try:
        request = urllib.request.Request(url, headers={"User-Agent": f"companion/{companion.__version__}"})
        response: HTTPResponse = opener.open(request, timeout=timeout)
    except HTTPError as error:
        error.close()
        raise CompanionError(
            f"{url} answered {error.code} {responses.get(error.code, '')}: try again later or another url."
        ) from error
    except TimeoutError as error:
        raise CompanionError(f"{url} did not answer within {timeout:g} s: try again later.") from error
    except (URLError, OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        text = " ".join(str(getattr(reason, "strerror", None) or reason).split())  # a server's nonsense has lines
        raise CompanionError(f"cannot reach {url}: {text}.") from error
    return response


def _read(url: str, response: HTTPResponse, timeout: float, place: str) -> bytes:
    try:
        return response.read1(BLOCK)  # what has come, unlike read, which waits for the whole block
    except TimeoutError as error:
        raise CompanionError(f"{url} sent nothing for {timeout:g} s {place}: try again later.") from error
    except (OSError, HTTPException) as error:
        raise CompanionError(f"{url} broke off {place}: try again.") from error


def _unpack(archive: IO[bytes], folder: str, target: Path) -> None:
    """Copy the plain files that lie in one folder of the archive; whatever else a tar can hold stays in it."""
    target.mkdir()
    with tarfile.open(fileobj=archive) as tar:
        for member in tar:
            path = PurePosixPath(member.name)
            content = tar.extractfile(member) if member.isfile() and str(path.parent) == folder else None
            if content is not None:
                with content, (target / path.name).open("wb") as file:
                    shutil.copyfileobj(content, file)
