"""`tessera-local`: the commands behind the Makefile."""

import argparse
import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence

from tessera.local.console import say
from tessera.local.environment import settings_file
from tessera.local.errors import LocalError
from tessera.local.folders import CHECKOUT, home, kept
from tessera.local.platform import NOT_RUNNING, Platform, exclusive
from tessera.local.settings import LocalSettings

TOUR = CHECKOUT / "tests" / "e2e" / "tour.py"
_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; exit code 0 when it did what it says, 1 with one clear message when it could not, 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="tessera-local", description="The platform of one checkout, without Docker.")
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("names", nargs="*", help="for logs: whose; for clean: `all`")
    options = parser.parse_args(arguments)
    try:
        return COMMANDS[options.command](options.names)
    except LocalError as problem:
        sys.stderr.write(f"{problem}\n")
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left: `make status | head`
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\nInterrupted. What was started keeps running: `make run` continues, `make stop` ends it.\n")
        return _INTERRUPTED


def run(_: Sequence[str]) -> int:
    """Bring the platform up, then go on the tour."""
    started = time.monotonic()
    with exclusive(home()):
        platform = _platform(choose_ports=True)
        say(f"Starting Tessera (everything it keeps is in {_shown(home())})")
        platform.up()
    say(f"Ready after {time.monotonic() - started:.1f} s.")
    code = tour(()) if platform.settings.tour and TOUR.exists() else 0
    _explain(platform)
    return code


def tour(_: Sequence[str]) -> int:
    """Walk through the platform on real input; needs it running."""
    platform = _running()
    say()
    written = {name: value for name, value in settings_file().items() if value}  # as the services have it: topics may have a prefix there
    variables = {**written, **os.environ, **platform.plan.client_environment(), "TESSERA_HOME": str(home())}
    code = subprocess.run([sys.executable, str(TOUR)], env=variables, check=False).returncode
    if code:
        say(f"The tour failed (exit code {code}).")
    return 1 if code else 0


def stop(_: Sequence[str]) -> int:
    """Stop everything of this checkout."""
    if not _was_used():
        say("Nothing is running.")
        return 0
    with exclusive(home()):
        _platform(choose_ports=True).down()
    say("Stopped.")
    return 0


def status(_: Sequence[str]) -> int:
    """Say what runs; exit code 3 when something is not ready."""
    platform = _platform()
    for line in platform.report():
        say(line)
    return 0 if platform.is_ready() else 3


def logs(names: Sequence[str]) -> int:
    """Follow the logs of the named processes, or of all, until interrupted."""
    folder = home() / "logs"
    files = sorted(file for file in folder.glob("*.log") if not names or file.stem in names or file.stem.partition("-")[0] in names)
    if not files:
        raise LocalError(f"No logs of {', '.join(names) or 'anything'} in {_shown(folder)}.")
    with contextlib.suppress(KeyboardInterrupt):
        return subprocess.run(["tail", "-n", "50", "-F", *map(str, files)], check=False).returncode
    return 0


def env(_: Sequence[str]) -> int:
    """Shell exports for whoever connects."""
    for name, value in _running().plan.client_environment().items():
        say(f"export {name}={shlex.quote(value)}")
    return 0


def clean(names: Sequence[str]) -> int:
    """Stop, then delete data, logs, traces and secrets; with `all` also what was downloaded. The environment this runs in stays."""
    staying = kept(with_downloads="all" not in names)
    if home().exists():
        stop(())
        for entry in home().iterdir():
            if entry.name not in staying:
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    say("Deleted." if "all" in names else f"Deleted; downloads stay in {_shown(home() / 'cache')} (`make clean ALL=yes` deletes them too).")
    return 0


COMMANDS: Mapping[str, Callable[[Sequence[str]], int]] = {
    function.__name__: function for function in (run, tour, stop, status, logs, env, clean)
}


def _was_used() -> bool:
    """Whether there is more than `make setup` leaves."""
    return home().exists() and any(entry.name not in kept() for entry in home().iterdir())


def _platform(*, choose_ports: bool = False) -> Platform:
    if not choose_ports and not home().exists():
        raise LocalError(NOT_RUNNING)
    return Platform(home(), LocalSettings(), choose_ports=choose_ports)


def _running() -> Platform:
    platform = _platform()
    if not platform.is_running:
        raise LocalError(NOT_RUNNING)
    return platform


def _explain(platform: Platform) -> None:
    environment = platform.plan.client_environment()
    say()
    say(f"Tessera listens on   {environment['TESSERA_URL']}   (OpenAI-compatible: {environment['TESSERA_URL']}/v1)")
    say(f"Kafka                {environment['KAFKA_BOOTSTRAP_SERVERS']}")
    say('Connect a client     eval "$(make -s env)"')
    say("Look                 make status · make logs · make trace ID=<request id>")
    say("Stop                 make stop   (data stays; make clean deletes it)")


def _shown(path: object) -> str:
    return os.path.relpath(str(path))


if __name__ == "__main__":
    raise SystemExit(main())
