"""The stored form of a Postgres password (RFC 5802, RFC 7677; format in Postgres's src/common/scram-common.c)."""

import hashlib
import hmac
import os
from base64 import b64encode

ITERATIONS = 4096


def verifier(password: str, salt: bytes | None = None) -> str:
    """The SCRAM-SHA-256 verifier that CREATE ROLE accepts in place of the password.

    Raises ValueError for an empty password, and for one outside printable ASCII, which would need SASLprep.
    """
    if not password or not all(" " <= character <= "~" for character in password):
        raise ValueError("a Postgres password must be one or more printable ASCII characters")
    salt = salt or os.urandom(16)
    salted = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, ITERATIONS)
    stored = hashlib.sha256(hmac.digest(salted, b"Client Key", "sha256")).digest()
    server = hmac.digest(salted, b"Server Key", "sha256")
    return f"SCRAM-SHA-256${ITERATIONS}:{_text(salt)}${_text(stored)}:{_text(server)}"


def _text(data: bytes) -> str:
    return b64encode(data).decode()
