"""Compile Horovod for this Python and its PyTorch, keep the wheel in the user's cache, and install it.

    python tools/build_horovod.py [--or-skip]

Horovod 0.28.1 is its newest release and older than PyTorch's present C++, so it does not install as it is. Here it is
built for the CPU (PyTorch over Gloo, no MPI); what the build needs and leaves stays out of the environment. With
``--or-skip``, a machine that cannot compile it is told so and all is well, unless the environment variable CI is set.
"""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
VERSION = "0.28.1"
SHA256 = "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0"  # of the source on the package index
CMAKE = "cmake==3.31.10"  # from 4 on, CMake refuses the age of Gloo's build files

# Horovod's CMakeLists.txt asks for C++14, PyTorch's headers for C++20: after project(), C++14 gets C++20's options.
# Messages name the source file without the folder it was compiled in; no symbols for a debugger, so sooner and smaller.
# A CUDA compiler is hidden, because Horovod's kernels are too old for a current one.
AFTER_PROJECT = """
set(CMAKE_CXX14_STANDARD_COMPILE_OPTION -std=c++20)
set(CMAKE_CXX14_EXTENSION_COMPILE_OPTION -std=gnu++20)
string(APPEND CMAKE_CXX_FLAGS " -ffile-prefix-map=${CMAKE_SOURCE_DIR}/=")
set(CMAKE_CXX_FLAGS_RELWITHDEBINFO "-O2 -DNDEBUG")
"""
TOOLCHAIN = """
set(CMAKE_PROJECT_INCLUDE "{after_project}")
set(CMAKE_CUDA_COMPILER NOTFOUND)
set(CMAKE_DISABLE_FIND_PACKAGE_CUDAToolkit ON)
"""
HIDE_CUDA = """
import sys
if "-c" in sys.orig_argv:  # what CMake asks of Python, not pip itself: torch takes its time
    import torch.utils.cpp_extension
    torch.utils.cpp_extension.CUDA_HOME = None
"""


def obstacle() -> str:
    """Why Horovod cannot be compiled here and what to do about it, in one sentence; empty if it can."""
    if sys.platform != "linux":
        return (
            "Horovod is compiled on Linux only: use Linux (a container or WSL will do), or torchrun instead of Horovod."
        )
    try:
        version("torch")
    except PackageNotFoundError:
        return f"Horovod is compiled against PyTorch, which {sys.executable} does not have: install it first."
    compiler = shlex.split(os.environ.get("CXX") or "c++")[0]
    for program in (compiler, "make"):
        if not shutil.which(program):
            return f"Horovod needs a C++ compiler and make, and there is no {program} here: apt install g++ make, say."
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "Horovod needs the headers of this Python, and there is no Python.h: apt install python3-dev, say."
    return ""


def folder() -> Path:
    """Where the wheel is kept: one for each pair of Horovod and PyTorch, each Python and each kind of machine."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    python = "cp{}{}".format(*sys.version_info[:2])
    return cache / "companion" / "horovod" / f"{VERSION}-torch{version('torch')}-{python}-{platform.machine()}"


def build(place: Path) -> Path:
    """The wheel in ``place``, built if there is none; whoever comes second waits for the first."""
    import fcntl  # not on Windows, where `obstacle` comes first

    place.mkdir(parents=True, exist_ok=True)
    with (place / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (wheels := list(place.glob("*.whl"))):
            # Not in the cache: Horovod does not link in a folder whose name has a space.
            with TemporaryDirectory(prefix="horovod-", ignore_cleanup_errors=True) as work:
                made = _compile(Path(work), place / "build.log")
                shutil.copy(made, place / "part")
            wheels = [(place / "part").rename(place / made.name)]
        return wheels[0]


def _compile(work: Path, log: Path) -> Path:
    """Make the wheel in ``work``."""
    print(
        f"building Horovod {VERSION} for PyTorch {version('torch')} and Python {platform.python_version()}: "
        f"3 to 5 minutes, once; the log is {log}",
        flush=True,
    )
    tools = work / "tools"  # importable during the build, beside what is installed
    tools.mkdir()
    (tools / "sitecustomize.py").write_text(HIDE_CUDA)
    (tools / "after_project.cmake").write_text(AFTER_PROJECT)
    (tools / "toolchain.cmake").write_text(TOOLCHAIN.format(after_project=tools / "after_project.cmake"))
    (tools / "horovod.txt").write_text(f"horovod=={VERSION} --hash=sha256:{SHA256}\n")
    cores = len(os.sched_getaffinity(0))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HOROVOD_", "CMAKE_"))} | {
        "HOROVOD_WITH_PYTORCH": "1",
        "HOROVOD_WITH_GLOO": "1",
        "HOROVOD_WITHOUT_MPI": "1",
        "HOROVOD_WITHOUT_TENSORFLOW": "1",
        "HOROVOD_WITHOUT_MXNET": "1",
        "HOROVOD_CMAKE": str(tools / "cmake" / "data" / "bin" / "cmake"),
        "CMAKE_TOOLCHAIN_FILE": str(tools / "toolchain.cmake"),
        "MAKEFLAGS": f"-j{cores if cores <= 2 else cores - 1}",
        "PYTHONPATH": str(tools),
        "TMPDIR": str(work),
    }
    # Not from pip's own cache of wheels, which does not know one PyTorch from another.
    flags = ["--no-cache-dir", "--no-deps", "--no-build-isolation", "--use-pep517", "--no-binary", "horovod"]
    with log.open("wb") as file:
        for arguments in (
            ["install", "--target", tools, CMAKE],
            ["wheel", *flags, "--require-hashes", "--wheel-dir", work, "-r", tools / "horovod.txt"],
        ):
            command = ["nice", sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
            done = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
            if done.returncode:
                last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:]
                sys.exit("\n".join([*last, f"Horovod was not built, for the reason above; the whole log is {log}"]))
    (wheel,) = work.glob("*.whl")
    return wheel


def install(wheel: Path) -> None:
    """Install the wheel and what it needs at run time, unless this very wheel is installed."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--no-deps", "--force-reinstall", wheel], check=True)
    subprocess.run([*pip, "-c", ROOT / "constraints.txt", *extras["horovod"]], check=True)


def installed(wheel: Path) -> bool:
    """Whether this environment's Horovod came from this very file."""
    try:
        origin = distribution("horovod").read_text("direct_url.json")  # pip's note (PEP 610)
    except PackageNotFoundError:
        return False
    return origin is not None and hashlib.sha256(wheel.read_bytes()).hexdigest() in origin


def main() -> None:
    if why := obstacle():
        if "--or-skip" in sys.argv[1:] and not os.environ.get("CI"):
            print(f"{why} Until then its tests are skipped.")
            return
        sys.exit(why)
    wheel = build(folder())
    if not installed(wheel):
        install(wheel)
        print(f"installed Horovod {VERSION} from {wheel.parent}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; the same command starts again")
    except (OSError, subprocess.CalledProcessError) as error:  # a full disk, a cache that cannot be written, …
        sys.exit(f"Horovod was not installed: {error}")
