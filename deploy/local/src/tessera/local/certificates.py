"""An authority of one's own and the certificates it issues, made by the `openssl` program. For tests: keys lie beside the certificates."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tessera.local.errors import LocalError, MissingToolError
from tessera.local.ports import LOOPBACK

_DAYS = "30"
_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256")
_SERVER_NAMES = f"subjectAltName=IP:{LOOPBACK},DNS:localhost"


@dataclass(frozen=True)
class Certificate:
    """A certificate and its key, in PEM form."""

    certificate_file: Path
    key_file: Path


@dataclass(frozen=True)
class Authority:
    """Issues certificates into one folder."""

    folder: Path

    @property
    def ca_file(self) -> Path:
        """Its own certificate: what those who trust it are given."""
        return self.folder / "ca.pem"

    def create(self) -> None:
        """Make the authority's key and certificate. Raises MissingToolError, LocalError. Blocks."""
        self.folder.mkdir(parents=True, exist_ok=True)
        usage = ("-addext", "keyUsage=critical,keyCertSign,cRLSign")
        _openssl("req", "-x509", *_KEY, "-noenc", "-keyout", self._key, "-out", self.ca_file, "-subj", "/CN=authority", *usage)

    def issue(self, name: str, *, server_names: str = _SERVER_NAMES, password: str = "") -> Certificate:
        """Issue a certificate for the common name `name`, good for servers and clients; again for the same name replaces it.

        `server_names` is a subjectAltName. With a password the key is encrypted. Raises MissingToolError, LocalError. Blocks.
        """
        made = Certificate(self.folder / f"{name}.pem", self.folder / f"{name}.key")
        signed = ("-CA", self.ca_file, "-CAkey", self._key, "-addext", server_names, "-addext", "basicConstraints=critical,CA:FALSE")
        encrypted = ("-passout", "env:KEY_PASSWORD") if password else ("-noenc",)
        target = ("-keyout", made.key_file, "-out", made.certificate_file, "-subj", f"/O=Tessera/CN={name}")
        _openssl("req", "-x509", *_KEY, *encrypted, *target, *signed, password=password)
        return made

    @property
    def _key(self) -> Path:
        return self.folder / "ca.key"


def _openssl(*arguments: str | Path, password: str = "") -> None:
    program = shutil.which("openssl")
    if program is None:
        raise MissingToolError("openssl is missing: install it (on Debian: openssl), version 3 or newer.")
    command = [program, *map(str, arguments), "-days", _DAYS]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "KEY_PASSWORD": password})
    if done.returncode != 0:
        raise LocalError(f"openssl could not make a certificate:\n{done.stderr}")
