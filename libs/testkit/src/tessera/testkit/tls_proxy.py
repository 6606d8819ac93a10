"""TLS in front of a server that was built without it, as the packaged Postgres and Redis are."""

import asyncio
import ssl
from pathlib import Path

from tessera.local.certificates import Certificate
from tessera.testkit.proxy import Proxy

_SSL_REQUEST = bytes.fromhex("0000000804d2162f")  # https://www.postgresql.org/docs/18/protocol-message-formats.html, SSLRequest


class TlsProxy(Proxy):
    """Ends TLS and passes the bytes on to `target_port`.

    `postgres=True` speaks Postgres' SSLRequest first and closes connections that begin without it. With `client_authority` only
    clients with a certificate of that authority get through.
    """

    def __init__(self, target_port: int, certificate: Certificate, *, postgres: bool = False, client_authority: Path | None = None) -> None:
        self.connections = 0
        """Clients that came through the handshake."""
        self._postgres = postgres
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.use(certificate)
        if client_authority is not None:
            self._context.load_verify_locations(client_authority)
            self._context.verify_mode = ssl.CERT_REQUIRED
        super().__init__(target_port, None if postgres else self._context)

    def use(self, certificate: Certificate) -> None:
        """Show this certificate to every new client."""
        self._context.load_cert_chain(certificate.certificate_file, certificate.key_file)

    async def _admitted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        if self._postgres and not await self._upgraded(reader, writer):
            return False
        self.connections += 1
        return True

    async def _upgraded(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        if await reader.readexactly(len(_SSL_REQUEST)) != _SSL_REQUEST:
            return False
        writer.write(b"S")
        await writer.start_tls(self._context)
        return True
