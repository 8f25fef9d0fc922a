"""The definitions that every figure of the course uses, and how a figure is written.

MAC
    one multiply–add, a·b + c. "MACs" is how many of them a network needs.
FLOPs
    floating-point operations, of which a multiply–add is two: FLOPs = 2 × MACs. A number of operations.
FLOPS
    FLOPs per second: a rate, of a machine.
KiB, MiB, GiB
    2^10, 2^20, 2^30 bytes. (kB, MB and GB, powers of ten, appear only in data sheets.)

What is counted are matrix products, convolutions and attention, as papers do; additions, activations, pooling and
normalisation are not, although they take time. Sources differ here by up to a factor of two, so always say which.
"""

import re
from collections.abc import Iterable, Sequence
from decimal import Decimal

from companion.errors import CompanionError

FLOPS_PER_MAC = 2
KIB, MIB, GIB = 2**10, 2**20, 2**30


def format_count(number: float, unit: str = "") -> str:
    """``1814083944`` → ``1.814 G``; four digits, and the unit after the SI prefix (``1.814 GMAC``)."""
    return _scaled(number, 1000, ("", "k", "M", "G", "T", "P", "E"), unit, small=1)


def format_bytes(number: float) -> str:
    """``46830571`` → ``44.66 MiB``."""
    return _scaled(number, 1024, ("", "Ki", "Mi", "Gi", "Ti", "Pi"), "B", small=1)


def parse_bytes(text: str) -> int:
    """``256MiB`` → ``268435456``; a plain number is bytes.

    Raises:
        CompanionError: not a size.
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?(B|KiB|MiB|GiB|)", text.strip())
    if found is None:
        raise CompanionError(f"{text!r} is not a size: give a number of bytes, or one such as 256MiB or 1GiB.")
    size = Decimal(found[1]) * {"KiB": KIB, "MiB": MIB, "GiB": GIB}.get(found[2], 1)
    if size >= 2**63:
        raise CompanionError(f"{text[:40]!r} is more bytes than there are: give fewer.")
    return int(size)


def format_seconds(number: float) -> str:
    """``0.00123`` → ``1.230 ms``."""
    return _scaled(number, 1000, ("n", "µ", "m", ""), "s", small=1e-9)


def format_table(rows: Iterable[Sequence[str]]) -> str:
    """Lines of aligned columns that never wrap, so that a command in one can be copied; the first row is the heads'."""
    lines = list(rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(line.rstrip() for line in aligned)


def _scaled(number: float, base: float, prefixes: tuple[str, ...], unit: str, *, small: float) -> str:
    """``number`` with four digits and the prefix that leaves it from 1 to ``base``; ``small`` is the first one's."""
    value, index = number / small, 0
    # 999.96 would be written 1000: the next prefix is due a little earlier.
    while abs(value) >= base * (1 - 5e-5) and index < len(prefixes) - 1:
        value, index = value / base, index + 1
    whole = prefixes[index] == "" and small == 1  # a plain number of things or bytes
    text = f"{value:.0f}" if whole or abs(value) >= 1000 else f"{value:#.4g}".rstrip(".")
    return f"{text} {prefixes[index]}{unit}".rstrip()
