"""Access tokens of an OpenID provider: which are taken, and what their claims let the holder do. Whatever is not said is denied."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final, Literal, get_args

from tessera.gateway.domain import keys
from tessera.gateway.domain.errors import ApiError
from tessera.gateway.domain.keys import Principal

Algorithm = Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]
ALGORITHMS: Final[tuple[Algorithm, ...]] = get_args(Algorithm)
"""Those with a public key only: whoever can check a token of one of these cannot make one."""

BY_ROLE_ONLY: Final = frozenset({"admin"})
"""Scopes that reach across tenants: an operator gives them to a role by name, no token can ask for them."""

MAXIMUM_TOKEN_LENGTH: Final = 16_384
_LONGEST_SUBJECT: Final = 255  # OpenID Connect Core, section 2
_TOKEN: Final = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")
_TENANT: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
_TYPES: Final = frozenset({"jwt", "at+jwt"})  # RFC 9068, section 4: with or without "application/"


class TokenRefusedError(ApiError):
    """401: the token opens nothing. `reason` is for the log: it names what was looked at, and nothing that the token says."""

    def __init__(self, reason: str, code: str = "invalid_api_key", message: str = "Incorrect API key or access token provided.") -> None:
        super().__init__(401, code, message)
        self.reason = reason


class TokenExpiredError(TokenRefusedError):
    """401: the issuer did sign it, and its time is over."""

    def __init__(self) -> None:
        super().__init__("expired", "token_expired", "The access token has expired. Get another from your provider.")


@dataclass(frozen=True)
class Trust:
    """Whose tokens are taken."""

    issuer: str
    audience: str
    algorithms: frozenset[Algorithm]
    leeway: timedelta = timedelta(0)
    """How far clocks may differ."""


@dataclass(frozen=True)
class Rights:
    """Where a token says what it may do. A claim is given by its name, or by a JSON Pointer (`/realm_access/roles`)."""

    tenant_claim: str = "tenant"
    scopes_claim: str = "scope"
    roles_claim: str = "roles"
    scopes_of_role: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def of(self, claims: Mapping[str, Any]) -> frozenset[str]:
        """The scopes that are known here. Anything else that a token says is nothing."""
        asked = _words(claim(claims, self.scopes_claim)) & (frozenset(keys.SCOPES) - BY_ROLE_ONLY)
        roles = _names(claim(claims, self.roles_claim)) & self.scopes_of_role.keys()
        return asked.union(*(self.scopes_of_role[role] for role in roles))


def looks_like_a_token(text: str) -> bool:
    """Three parts in base64url, not too long. Padding is not allowed: a token can be written in one way only."""
    return len(text) <= MAXIMUM_TOKEN_LENGTH and _TOKEN.fullmatch(text) is not None


def key_meant(header: Mapping[str, Any], trust: Trust) -> tuple[Algorithm, str | None]:
    """The algorithm, one of those that are trusted, and the id of the key. Raises TokenRefusedError."""
    algorithm, key_id, kind = header.get("alg"), header.get("kid"), header.get("typ", "JWT")
    known = next((each for each in trust.algorithms if each == algorithm), None)
    if known is None:
        raise TokenRefusedError("algorithm")
    if not isinstance(kind, str) or kind.lower().removeprefix("application/") not in _TYPES:
        raise TokenRefusedError("type")
    return known, key_id if isinstance(key_id, str) else None


def principal(claims: Mapping[str, Any], issuer: str, rights: Rights) -> Principal:
    """Who is asking, by claims that were checked. Whether there is such a tenant is still to be seen. Raises TokenRefusedError."""
    tenant_id, subject = claim(claims, rights.tenant_claim), claims.get("sub")
    if not isinstance(tenant_id, str) or _TENANT.fullmatch(tenant_id) is None:
        raise TokenRefusedError("tenant")
    if not isinstance(subject, str) or not 0 < len(subject) <= _LONGEST_SUBJECT or not _encodable(subject):
        raise TokenRefusedError("subject")
    return Principal(tenant_id, credential_id(issuer, tenant_id, subject), rights.of(claims), user=subject)


def credential_id(issuer: str, tenant_id: str, subject: str) -> str:
    """What stands where an API key has its id: the same for every token of one subject, and no name."""
    digest = hashlib.blake2b("\x00".join((issuer, tenant_id, subject)).encode(), digest_size=16).hexdigest()
    return f"oidc:{digest}"


def claim(claims: Mapping[str, Any], name: str) -> Any:
    """The value of a claim by its name or JSON Pointer (RFC 6901); None where there is none."""
    if not name.startswith("/"):
        return claims.get(name)
    value: Any = claims
    for step in name[1:].split("/"):
        value = value.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(value, Mapping) else None
    return value


def _words(value: Any) -> frozenset[str]:
    """RFC 8693, section 4.2, separates scopes by spaces; some providers give a list."""
    return frozenset(value.split(" ")) if isinstance(value, str) else _names(value)


def _names(value: Any) -> frozenset[str]:
    if isinstance(value, str):
        return frozenset({value})
    return frozenset(each for each in value if isinstance(each, str)) if isinstance(value, list) else frozenset()


def _encodable(text: str) -> bool:
    """JSON can name half of a surrogate pair, which is no character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
