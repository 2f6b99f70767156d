"""Can the rows of a program be cut over the ranks that share them (context parallelism)?"""

from trainer.config import ConfigError, divisors
from trainer.program import Program, named


def pieces(cp: int) -> int:
    """A row is cut into as many of equal length, or a multiple of it (trainer/model/context.py)."""
    return 2 * cp if cp > 1 else 1


def check_rows(program: Program, *, cp: int) -> None:
    """Raises: ConfigError if a span has rows that cannot be cut over cp ranks."""
    for span in program.spans:
        if (length := span.now.seq_len) % pieces(cp):
            near = [
                n for n in (length // pieces(cp) * pieces(cp), -(-length // pieces(cp)) * pieces(cp)) if n
            ]
            fitting = [n for n in divisors(length) if length % pieces(n) == 0 and n <= cp]
            raise ConfigError(
                f"{named(span.name)}seq_len={length} is no multiple of 2 x parallel.cp={cp}, the pieces of a "
                f"row; use seq_len={' or '.join(map(str, near))}, or parallel.cp from {fitting}"
            )
