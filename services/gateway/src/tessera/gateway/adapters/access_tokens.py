"""Checks access tokens with PyJWT."""

from collections.abc import Mapping
from typing import Any, Final

import jwt

from tessera.gateway.adapters.issuer import IssuerKeys
from tessera.gateway.domain import oidc
from tessera.gateway.domain.oidc import TokenExpiredError, TokenRefusedError, Trust

_REQUIRED: Final = ["iss", "aud", "exp", "sub"]


class JwtAccessTokens:
    """Implements `ports.AccessTokens`. Only the header is read before the signature is known to be good."""

    def __init__(self, keys: IssuerKeys, trust: Trust) -> None:
        self._keys = keys
        self._trust = trust

    async def claims(self, token: str) -> Mapping[str, Any]:
        """By the key that the header names, of those that the issuer publishes: keys and addresses in the header are not looked at."""
        algorithm, key_id = self._header(token)
        key = await self._keys.find(algorithm, key_id)
        if key is None:
            raise TokenRefusedError("unknown key")
        return self._verified(token, key)

    def _header(self, token: str) -> tuple[oidc.Algorithm, str | None]:
        if not oidc.looks_like_a_token(token):
            raise TokenRefusedError("form")
        try:
            header = jwt.get_unverified_header(token)
        except jwt.PyJWTError as error:
            raise TokenRefusedError(type(error).__name__) from error
        return oidc.key_meant(header, self._trust)

    def _verified(self, token: str, key: jwt.PyJWK) -> Mapping[str, Any]:
        trust = self._trust
        try:
            claims: Mapping[str, Any] = jwt.decode(
                token,
                key,
                algorithms=list(trust.algorithms),
                audience=trust.audience,
                issuer=trust.issuer,
                leeway=trust.leeway,
                options={"require": _REQUIRED},
            )
        except jwt.ExpiredSignatureError as error:
            raise TokenExpiredError from error
        except jwt.PyJWTError as error:
            raise TokenRefusedError(type(error).__name__) from error
        return claims
