"""AG News: titles and first sentences of news, in four classes."""

import csv
import gzip
import io
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from companion.datasets.store import data_folder, put_by_hand
from companion.datasets.texts import Texts, split_texts
from companion.errors import CompanionError

LABELS = ("World", "Sports", "Business", "Sci/Tech")
LARGEST = 1 << 28  # bytes; the whole of it has an eighth of that
COLUMNS = ["label", "title", "description"]
FORMS = "ag_news.csv or ag_news.csv.gz (columns label, title and description)"


def find(root: str | os.PathLike[str] | None = None) -> Path | None:
    """Where AG News lies; None if nowhere.

    ``root`` is the file itself or a folder that holds it; without it `data_folder` is searched.
    """
    place = data_folder() if root is None else Path(os.path.expanduser(root))
    if root is not None and place.is_file():
        return place
    return next((path for name in ("ag_news.csv.gz", "ag_news.csv") if (path := place / name).is_file()), None)


def locate(root: str | os.PathLike[str] | None = None) -> Path:
    """What `find` finds.

    Raises:
        CompanionError: nothing; the message says what to put where.
    """
    return put_by_hand(find(root), "AG News", FORMS, root)


def trouble(path: Path) -> str | None:
    """What is wrong with the copy at ``path`` (from `find`), after reading all of it; None if nothing is."""
    try:
        ag_news("test", root=path)
    except CompanionError as error:
        return str(error)
    return None


def ag_news(split: str, root: str | os.PathLike[str] | None = None, vocabulary: Sequence[str] | None = None) -> Texts:
    """News items, title and description, in four classes.

    It cannot be downloaded with `get`: put ``ag_news.csv``, or the same gzipped, into `data_folder`: UTF-8, a first
    line with the columns' names, then ``label``, ``title`` and ``description`` of each item, the label as in `LABELS`.
    Of items that are alike only the first stays; a fifth is for testing, chosen by its words. Terms: research, not
    commercial.

    Source: X. Zhang, J. Zhao and Y. LeCun, Character-level Convolutional Networks for Text Classification, 2015.

    Raises:
        CompanionError: it is not there or is damaged, a line has other columns or another label, or is blank, or there
            are too few items for two splits; or the vocabulary is none.
    """
    path = locate(root)
    data = split_texts("ag_news", _rows(path), LABELS, split, vocabulary)
    if len(data) == 0:
        raise CompanionError(f"{path} has no item for {split}: it needs more of them.")
    return data


def _rows(path: Path) -> Iterator[tuple[str, int]]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise CompanionError(f"{path} is not AG News: it has more than {LARGEST:,} bytes.")
        lines = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
        if next(lines, None) != COLUMNS:
            raise CompanionError(f"{path} is not AG News: its first line must be {','.join(COLUMNS)}.")
        for row in lines:
            where = f"{path}, line {lines.line_num}"
            if not any(cell.strip() for cell in row):
                raise CompanionError(f"{where} is blank: remove it.")
            if len(row) != len(COLUMNS):
                raise CompanionError(f"{where} has {len(row)} columns: give label, title and description.")
            label, title, description = row
            if label not in LABELS:
                raise CompanionError(f"{where} has the label {label!r}: use one of {', '.join(LABELS)}.")
            yield f"{title}\n{description}", LABELS.index(label)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise CompanionError(f"{path} is damaged or no table in UTF-8: {error}.") from error
