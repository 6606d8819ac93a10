"""Files that several processes read and write."""

import fcntl
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def replace_text(file: Path, text: str, mode: int = 0o644) -> None:
    """Write `file` so that a reader, or a crash, sees the old or the new text and never a part of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix=f".{file.name}.", delete=False) as temporary:
        temporary.write(text)
    Path(temporary.name).chmod(mode)
    Path(temporary.name).replace(file)


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold a lock file; blocks while another process, or thread, does."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
