"""Authentication by the tokens of an OpenID provider."""

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Final

from tessera.gateway.domain import oidc
from tessera.gateway.domain.keys import Principal
from tessera.gateway.domain.oidc import Rights, TokenRefusedError
from tessera.gateway.ports import AccessTokens, ActiveTenants
from tessera.telemetry import get_logger

CACHE_FOR: Final = timedelta(seconds=5)

_log = get_logger(__name__)


class TokenAuthenticator:
    """From a presented access token to a principal. For one event loop."""

    def __init__(
        self, tokens: AccessTokens, tenants: ActiveTenants, issuer: str, rights: Rights, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._tokens = tokens
        self._tenants = tenants
        self._issuer = issuer
        self._rights = rights
        self._clock = clock
        self._active_until: dict[str, float] = {}

    async def principal(self, token: str) -> Principal:
        """Raises ApiError 401 for a token that opens nothing, 503 where that cannot be known now."""
        try:
            return await self._principal(token)
        except TokenRefusedError as refusal:
            _log.info("token_refused", reason=refusal.reason)
            raise

    async def _principal(self, token: str) -> Principal:
        found = oidc.principal(await self._tokens.claims(token), self._issuer, self._rights)
        if not await self._is_active(found.tenant_id):
            raise TokenRefusedError("tenant is not active")
        return found

    async def _is_active(self, tenant_id: str) -> bool:
        """Only active ones are remembered, and there are no more of them than tenants."""
        if self._clock() < self._active_until.get(tenant_id, float("-inf")):
            return True
        self._active_until.pop(tenant_id, None)
        if not await self._tenants.is_active(tenant_id):
            return False
        self._active_until[tenant_id] = self._clock() + CACHE_FOR.total_seconds()
        return True
