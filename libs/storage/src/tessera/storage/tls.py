"""Encrypted connections: the files that say who we are and whom we trust, and contexts that notice when the files are replaced."""

import logging
import os
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

_log = logging.getLogger(__name__)


class TlsFiles(BaseModel):
    """Files in PEM form. An empty value is none. Every file is read when the settings are: a wrong one ends the start."""

    model_config = ConfigDict(extra="forbid")

    ca_file: Path | None = None
    """Certificates of the authorities that are trusted; without it the system's."""
    certificate_file: Path | None = None
    """The client's own certificate, with those between it and its authority; may hold the key too."""
    key_file: Path | None = None
    """The client's private key, where it is not in the certificate's file."""
    key_password: SecretStr | None = Field(default=None, repr=False)
    """Where the key is encrypted."""

    @field_validator("ca_file", "certificate_file", "key_file", "key_password", mode="before")
    @classmethod
    def _empty_is_none(cls, value: Any) -> Any:
        return None if value == "" else value

    @model_validator(mode="after")
    def _usable(self) -> Self:
        if self.certificate_file is None and (self.key_file or self.key_password):
            raise ValueError("key_file and key_password belong to a certificate_file, which is missing")
        if self.are_given:  # the system's certificates, which take a while, are read where they are used
            self._load()
        return self

    def _load(self) -> ssl.SSLContext:
        """Raises ValueError naming the file that cannot be used."""
        return _loaded(self)

    @property
    def are_given(self) -> bool:
        """Whether any file is named."""
        return bool(self.ca_file or self.certificate_file)

    def context(self, *, verify: bool = True, check_hostname: bool = True) -> ssl.SSLContext:
        """A client's context, for asyncio only; each new connection uses the files as they are then.

        `verify=False` takes any server's certificate. Raises ValueError naming the file that cannot be used.
        """

        def build() -> ssl.SSLContext:
            context = self._load()
            context.check_hostname = verify and check_hostname
            context.verify_mode = ssl.CERT_REQUIRED if verify else ssl.CERT_NONE
            return context

        return _RenewingContext(build, self._files, ssl.PROTOCOL_TLS_CLIENT)

    @property
    def _files(self) -> list[Path]:
        return [file for file in (self.ca_file, self.certificate_file, self.key_file) if file]


class ListenerTls(TlsFiles):
    """What a server shows to its clients, and what it asks of them."""

    ca_file: Path | None = None
    """Certificates of authorities: only clients with a certificate of theirs are let in (mutual TLS). Every client where it is absent."""
    certificate_file: Path | None = None
    """The server's certificate, with those between it and its authority; may hold the key too. With it, TLS is all that is spoken."""

    @model_validator(mode="after")
    def _shows_something(self) -> Self:
        if self.ca_file and not self.certificate_file:
            raise ValueError("ca_file is for clients' certificates, and needs a certificate_file of the server's own")
        return self

    def listening_context(self) -> ssl.SSLContext | None:
        """A server's context, for asyncio only; each new connection uses the files as they are then. None where no certificate is named.

        Raises ValueError naming the file that cannot be used.
        """
        return _RenewingContext(self._load, self._files, ssl.PROTOCOL_TLS_SERVER) if self.certificate_file else None

    def _load(self) -> ssl.SSLContext:
        return _listening(self)


class _RenewingContext(ssl.SSLContext):
    """Stands for the newest context that could be built from the files.

    asyncio and uvloop call `wrap_bio` for every connection. The cost is a look at up to three files.
    """

    def __new__(cls, build: Callable[[], ssl.SSLContext], files: list[Path], protocol: int) -> Self:
        return super().__new__(cls, protocol)

    def __init__(self, build: Callable[[], ssl.SSLContext], files: list[Path], protocol: int) -> None:
        self._build = build
        self._files = files
        self._seen = self._look()
        self._newest = build()
        self.check_hostname = self._newest.check_hostname
        self.verify_mode = self._newest.verify_mode

    def wrap_bio(self, *arguments: Any, **options: Any) -> ssl.SSLObject:
        """As in the base class, with the newest files."""
        self._renew()
        return self._newest.wrap_bio(*arguments, **options)

    def _renew(self) -> None:
        found = self._look()
        if found == self._seen:
            return
        self._seen = found  # also where it cannot be used: the next connection is not to try the same again
        try:
            self._newest = self._build()
        except ValueError as error:
            # A replacement that is under way, or went wrong: what was loaded before may still serve.
            _log.warning("replaced TLS files are not taken: %s", error)

    def _look(self) -> list[tuple[int, int, int] | None]:
        return [fingerprint(file) for file in self._files]


def fingerprint(file: Path) -> tuple[int, int, int] | None:
    """What differs when a file has been written or replaced; None where there is none."""
    try:
        found = os.stat(file)  # noqa: PTH116 - Path.stat says the same in more words and more time
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _loaded(files: TlsFiles) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if files.ca_file is None:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    else:
        _trust(context, files.ca_file)
    if files.certificate_file is not None:
        _identify(context, files.certificate_file, files)
    return context


def _listening(files: ListenerTls) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    if files.ca_file is not None:
        _trust(context, files.ca_file)
        context.verify_mode = ssl.CERT_REQUIRED
    if files.certificate_file is not None:
        _identify(context, files.certificate_file, files)
    return context


def _trust(context: ssl.SSLContext, file: Path) -> None:
    try:
        context.load_verify_locations(cafile=file)
    except ssl.SSLError as error:
        raise ValueError(f"ca_file {file} holds no certificate in PEM form") from error
    except OSError as error:
        raise ValueError(f"ca_file {file} cannot be read: {error.strerror}") from error


def _identify(context: ssl.SSLContext, certificate: Path, files: TlsFiles) -> None:
    for name, file in (("certificate_file", certificate), ("key_file", files.key_file)):
        if file is not None and not os.access(file, os.R_OK):
            raise ValueError(f"{name} {file} cannot be read")
    # Never without a password: OpenSSL would ask the terminal for one.
    password = files.key_password.get_secret_value() if files.key_password else ""
    try:
        context.load_cert_chain(certificate, files.key_file, password)
    except ssl.SSLError as error:
        raise ValueError(_refusal(certificate, files.key_file or certificate, error)) from error


def _refusal(certificate: Path, key: Path, error: ssl.SSLError) -> str:
    if error.reason == "KEY_VALUES_MISMATCH":
        return f"the key in {key} does not belong to the certificate in {certificate}"
    return f"certificate_file {certificate} and key_file {key} cannot be used: no PEM form, or the key_password is missing or wrong"
