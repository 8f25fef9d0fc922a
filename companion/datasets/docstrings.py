"""What Python's own library says of itself, by subject: real texts that are there wherever Python is."""

import ast
import sys
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from companion.datasets.texts import Texts, split_texts
from companion.datasets.words import words
from companion.errors import CompanionError

FEWEST = 5  # words of a docstring; shorter ones ("Return a string.") tell no subject

# By the chapters of the library's manual. A module that a system leaves out (tkinter, say) is left out here, too.
SUBJECTS = {
    "text": (
        "string re difflib textwrap stringprep html xml json csv configparser tomllib plistlib gettext locale "
        "codecs encodings pprint reprlib"
    ),
    "numbers": (
        "numbers fractions statistics random decimal _pydecimal datetime _pydatetime calendar colorsys "
        "_strptime zoneinfo"
    ),
    "files": (
        "pathlib shutil os posixpath ntpath genericpath tempfile glob fnmatch filecmp fileinput linecache "
        "stat io _pyio zipfile tarfile gzip bz2 lzma _compression zipapp"
    ),
    "network": (
        "socket ssl http urllib ftplib smtplib imaplib poplib socketserver xmlrpc email mailbox ipaddress "
        "wsgiref webbrowser selectors base64 quopri mimetypes netrc uuid secrets hmac"
    ),
    "concurrency": (
        "asyncio threading _threading_local multiprocessing concurrent subprocess queue sched contextlib signal"
    ),
    "testing": (
        "unittest doctest pdb bdb cProfile profile pstats trace timeit tracemalloc logging warnings traceback "
        "faulthandler"
    ),
    "language": (
        "ast tokenize inspect dis importlib pkgutil runpy typing types symtable code codeop compileall "
        "py_compile opcode modulefinder pickletools keyword tabnanny pyclbr pydoc abc functools dataclasses "
        "enum"
    ),
    "interfaces": "tkinter turtle curses cmd argparse optparse getopt getpass idlelib",
}
LABELS = tuple(SUBJECTS)
# Written for those who work on Python, or about tests; data for a module's tests is no documentation of it.
LEFT_OUT = {"test", "tests", "idle_test", "__pycache__", "__phello__"}


def docstrings(split: str, vocabulary: Sequence[str] | None = None) -> Texts:
    """Docstrings of the reader's own Python with the subject of their module: some 6,500 in eight classes, or 5,000
    where tkinter and IDLE are left out.

    Those of modules, classes and functions that have five words or more. The sources are parsed and nothing is
    imported. Of docstrings that are alike only the first stays. Which split one is in depends on its words alone.
    Another version of Python has some others, so accuracies of different versions compare only roughly.

    Args:
        split: ``train`` or ``test``, four fifths and one.
        vocabulary: of a network that was trained before, in the order of the ids; None builds one from the training
            split.

    Raises:
        CompanionError: this Python has come without the sources of its library, or the vocabulary is none.
    """
    return split_texts("docstrings", _documents(), LABELS, split, vocabulary)


@cache
def _documents() -> list[tuple[str, int]]:
    library = Path(sysconfig.get_path("stdlib"))
    found = [
        (text, label)
        for label, modules in enumerate(SUBJECTS.values())
        for module in modules.split()
        for file in _sources(library, module)
        for text in _docstrings(file)
        if len(words(text, FEWEST)) == FEWEST
    ]
    if not found:
        raise CompanionError(
            f"Python {sys.version.split()[0]} has no sources of its library in {library}, where the docstrings would "
            "come from: use a Python that was installed with them."
        )
    return found


def _sources(library: Path, module: str) -> Iterator[Path]:
    if (file := library / f"{module}.py").is_file():
        yield file
    for file in sorted((library / module).rglob("*.py")):
        if not LEFT_OUT.intersection(file.relative_to(library).parts):
            yield file


def _docstrings(file: Path) -> Iterator[str]:
    """In the order of the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that a later Python refuses
            tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):  # not for this Python, or not for these eyes
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
            text := ast.get_docstring(node)
        ):
            yield text
