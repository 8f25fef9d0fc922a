import hashlib
import os
import subprocess
import sys

import pytest

from companion import CompanionError
from companion.files import check_writable, replacing, replacing_named, sha256, working_path


def names(folder):
    return {path.name for path in folder.iterdir()}


def write(path, content):
    with replacing(path) as file:
        file.write(content)


def test_the_file_appears_whole_and_alone(tmp_path):
    with replacing(tmp_path / "x") as file:
        file.write(b"new")
        assert not (tmp_path / "x").exists()
    assert (tmp_path / "x").read_bytes() == b"new"
    assert names(tmp_path) == {"x"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file(tmp_path, error):
    write(tmp_path / "x", b"old")

    def write_half():
        with replacing(tmp_path / "x") as file:
            file.write(b"half")
            raise error

    with pytest.raises(error):
        write_half()
    assert (tmp_path / "x").read_bytes() == b"old"
    assert names(tmp_path) == {"x"}


def test_a_name_to_write_to_ends_as_the_file_does(tmp_path):
    (tmp_path / "x.mp4").write_bytes(b"old")
    with replacing_named(tmp_path / "x.mp4") as part:
        assert part.suffix == ".mp4"
        part.write_bytes(b"new")
        assert (tmp_path / "x.mp4").read_bytes() == b"old"
    assert (tmp_path / "x.mp4").read_bytes() == b"new"
    assert names(tmp_path) == {"x.mp4"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_under_its_name(tmp_path, error):
    write(tmp_path / "x", b"old")

    def write_half():
        with replacing_named(tmp_path / "x") as part:
            part.write_bytes(b"half")
            raise error

    with pytest.raises(error):
        write_half()
    assert (tmp_path / "x").read_bytes() == b"old"
    assert names(tmp_path) == {"x"}


def test_a_name_that_nobody_wrote_to_is_an_error(tmp_path):
    with pytest.raises(CompanionError, match=r"^cannot write .*x: "), replacing_named(tmp_path / "x"):
        pass
    assert names(tmp_path) == set()


def test_permissions_are_those_of_any_new_file(tmp_path):
    write(tmp_path / "x", b"")
    (tmp_path / "y").touch()
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "y").stat().st_mode


def test_a_link_is_followed_and_stays(tmp_path):
    write(tmp_path / "x", b"old")
    (tmp_path / "link").symlink_to("x")
    write(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "x").read_bytes() == b"new"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes in folders")
def test_what_is_no_ordinary_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for job in (check_writable, lambda path: write(path, b"")):
        with pytest.raises(CompanionError, match="not an ordinary file"):
            job(tmp_path / "pipe")
        with pytest.raises(CompanionError, match="it is a folder"):
            job(tmp_path)
    assert names(tmp_path) == {"pipe"}


@pytest.mark.parametrize("path", ["missing/x", "file/x", "n" * 300])
def test_places_that_cannot_be_written_are_refused_in_one_sentence(tmp_path, path):
    (tmp_path / "file").touch()
    for job in (check_writable, lambda path: write(path, b"")):
        with pytest.raises(CompanionError, match="cannot write") as caught:
            job(tmp_path / path)
        assert "\n" not in str(caught.value)
    assert names(tmp_path) == {"file"}


def test_links_that_lead_in_a_circle(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(CompanionError, match="cannot write"):
        check_writable(tmp_path / "a")


def test_check_writable_leaves_nothing_and_harms_nothing(tmp_path):
    write(tmp_path / "x", b"old")
    check_writable(tmp_path / "x")
    check_writable(tmp_path / "new")
    assert names(tmp_path) == {"x"}
    assert (tmp_path / "x").read_bytes() == b"old"


def test_what_a_killed_process_left_is_removed_by_the_next_writer_but_not_what_a_living_one_is_writing(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f".x.{dead.pid}.part").write_bytes(b"half")
    (tmp_path / f".x.{os.getppid()}.part").write_bytes(b"half")
    write(tmp_path / "x", b"new")
    assert names(tmp_path) == {"x", f".x.{os.getppid()}.part"}


def test_each_process_works_under_a_name_of_its_own(tmp_path):
    program = (
        "import sys; from pathlib import Path; from companion.files import working_path; print(working_path(Path('x')))"
    )
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
    assert other != str(working_path(tmp_path / "x").name)


def test_sha256(tmp_path):
    (tmp_path / "x").write_bytes(b"abc" * 1000)
    assert sha256(tmp_path / "x") == hashlib.sha256(b"abc" * 1000).hexdigest()
