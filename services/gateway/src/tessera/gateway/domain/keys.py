"""API keys `tsr_<environment>_<id>_<secret><checksum>`.

The id finds the row, the secret proves possession and is kept only as HMAC-SHA-256 under a pepper, and the checksum (CRC-32 of all that
precedes it) lets a mistyped key and a secret scanner be told apart from a wrong one without a look-up.
"""

import hashlib
import hmac
import re
import secrets
import string
import zlib
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, Literal

from tessera.gateway.domain.limits import UNLIMITED, Allowance

ALPHABET: Final = string.digits + string.ascii_uppercase + string.ascii_lowercase
ID_LENGTH: Final = 16
SECRET_LENGTH: Final = 32  # 62^32 is 190 bits
CHECKSUM_LENGTH: Final = 6  # 62^6 exceeds 2^32

OnDisconnect = Literal["cancel", "finish"]

PREFIX: Final = "tsr_"
"""With which every key begins, and no access token."""
ENVIRONMENTS: Final = ("dev", "test", "live")
SCOPES: Final = ("inference", "memory:read", "memory:write", "retention", "validation", "usage", "admin", "audit")
DEFAULT_SCOPES: Final = ("inference", "memory:read", "memory:write", "retention", "validation")

_PATTERN: Final = re.compile(
    rf"(?P<body>tsr_(?P<environment>dev|test|live)_(?P<id>[0-9A-Za-z]{{{ID_LENGTH}}})_(?P<secret>[0-9A-Za-z]{{{SECRET_LENGTH}}}))"
    rf"(?P<checksum>[0-9A-Za-z]{{{CHECKSUM_LENGTH}}})"
)


@dataclass(frozen=True)
class ApiKey:
    """A key in the clear. It exists only while it is made or presented; its representation hides the secret."""

    environment: str
    id: str
    secret: str = field(repr=False)

    def reveal(self) -> str:
        """The text that the holder presents. Shown once, never logged."""
        body = f"tsr_{self.environment}_{self.id}_{self.secret}"
        return body + checksum(body)


@dataclass(frozen=True)
class StoredKey:
    """What the database knows of a key: everything but the secret."""

    tenant_id: str
    id: str
    digest: bytes
    scopes: frozenset[str]
    expires_at: datetime | None = None
    revoked_at: datetime | None = None
    former_digest: bytes | None = None
    """Of the secret before the last rotation."""
    former_until: datetime | None = None
    allowance: Allowance = UNLIMITED
    """What this key may use, where that is not what every key may."""
    on_disconnect: OnDisconnect | None = None

    def usable(self, now: datetime) -> bool:
        """Neither revoked nor expired."""
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)


@dataclass(frozen=True)
class Principal:
    """Who is asking: the tenant comes from here and from nowhere else."""

    tenant_id: str
    key_id: str
    scopes: frozenset[str]
    allowance: Allowance = UNLIMITED
    on_disconnect: OnDisconnect | None = None
    """What a client's leaving means for its generations, where the request does not say."""
    user: str | None = None
    """The person or program, where the credential says who it is (the subject of an access token)."""


def generate(environment: str) -> ApiKey:
    """A new key with 190 random bits. Raises ValueError for an environment that is not in ENVIRONMENTS."""
    if environment not in ENVIRONMENTS:
        raise ValueError(f"environment must be one of {', '.join(ENVIRONMENTS)}")
    return ApiKey(environment, _random(ID_LENGTH), new_secret())


def new_secret() -> str:
    """190 random bits."""
    return _random(SECRET_LENGTH)


def parse(text: str) -> ApiKey | None:
    """The parts of a presented key, or None where form or checksum is wrong. Any text is safe to give."""
    match = _PATTERN.fullmatch(text)
    if match is None or not hmac.compare_digest(checksum(match["body"]), match["checksum"]):
        return None
    return ApiKey(match["environment"], match["id"], match["secret"])


def digest(secret: str, pepper: bytes) -> bytes:
    """HMAC-SHA-256 of the secret: 32 bytes. A fast hash suffices because the secret has 190 random bits."""
    return hmac.new(pepper, secret.encode(), hashlib.sha256).digest()


def matches(key: ApiKey, stored: StoredKey, pepper: bytes, now: datetime) -> bool:
    """Whether it has the secret, or the one before it while that lives. Compares in constant time."""
    presented = digest(key.secret, pepper)
    if hmac.compare_digest(presented, stored.digest):
        return True
    if stored.former_digest is None or stored.former_until is None or stored.former_until <= now:
        return False
    return hmac.compare_digest(presented, stored.former_digest)


def checksum(body: str) -> str:
    """CRC-32 in base 62, six characters."""
    number = zlib.crc32(body.encode())
    digits = ""
    for _ in range(CHECKSUM_LENGTH):
        number, remainder = divmod(number, len(ALPHABET))
        digits = ALPHABET[remainder] + digits
    return digits


def _random(length: int) -> str:
    return "".join(secrets.choice(ALPHABET) for _ in range(length))
