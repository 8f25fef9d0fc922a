"""A small AG News file."""

import gzip

ROWS = [f"{label},Title {n} of {label},Sentence {n}" for n in range(10) for label in ("World", "Sci/Tech")]


def news(path, rows=ROWS, first="label,title,description"):
    content = "\n".join([first, *rows, ""]).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path
