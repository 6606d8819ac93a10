"""Kafka for tests: starts with an empty data folder, as any other node, but sooner."""

import threading
from pathlib import Path

from tessera.local.kafka import Kafka

_formatted: dict[Path, bytes] = {}
_FORMATTING = threading.Lock()


class CopiedKafka(Kafka):
    """A node whose empty data folder is a copy of the first one of this process: the tool that formats one is a JVM of a second each time.

    So all have one cluster id, and the same names of folders: none may become a member of another's cluster. A node with security has users
    of its own in its folder: it is a `Kafka`.
    """

    def _format(self) -> None:
        data = self.folder / "data"
        with _FORMATTING:
            if not _formatted:
                super()._format()
                _formatted.update({file.relative_to(data): file.read_bytes() for file in data.rglob("*") if file.is_file()})
                return
        for file, content in _formatted.items():
            (data / file).parent.mkdir(parents=True, exist_ok=True)
            (data / file).write_bytes(content)
