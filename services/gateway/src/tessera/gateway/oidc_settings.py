"""What an operator can set about access tokens (docs/authentication.md)."""

from datetime import timedelta
from typing import Annotated, Final, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from tessera.gateway.domain import keys
from tessera.gateway.domain.oidc import Algorithm, Rights, Trust
from tessera.storage import TlsFiles

ClaimName = Annotated[str, Field(min_length=1, max_length=256)]

_NEEDS_AN_ISSUER: Final = ("audience", "jwks_url", "roles")


class OidcSettings(BaseModel):
    """Whose access tokens are taken beside API keys, and what they may do. Nobody's without an issuer."""

    model_config = ConfigDict(extra="forbid")

    issuer: str | None = None
    """The provider, exactly as it stands in its tokens' `iss`."""
    audience: str | None = None
    """What tokens for this Tessera name in `aud`. Needed with an issuer."""
    jwks_url: str | None = None
    """Where its keys are. Without it the address is discovered at `<issuer>/.well-known/openid-configuration`."""
    algorithms: Annotated[frozenset[Algorithm], Field(min_length=1)] = frozenset({"RS256"})
    """Those that a token may be signed with, such as `["RS256", "ES256"]`. Only such with a public key can be named."""
    tenant_claim: ClaimName = "tenant"
    """The claim that names the tenant; like the others a name, or a JSON Pointer such as `/resource/tenant`."""
    scopes_claim: ClaimName = "scope"
    """The claim with scopes, separated by spaces or as a list. `admin` in it counts for nothing: only a role gives that."""
    roles_claim: ClaimName = "roles"
    """The claim with the list of roles; Keycloak's is `/realm_access/roles`."""
    roles: dict[str, frozenset[str]] = {}
    """The scopes of each role, such as `{"analyst": ["inference", "memory:read"]}`. Other roles give nothing."""
    leeway_seconds: Annotated[float, Field(ge=0, le=300)] = 30.0
    """How far the provider's clock may differ."""
    timeout_seconds: Annotated[float, Field(gt=0, le=30)] = 3.0
    """Longest wait for each of the provider's documents."""
    keys_renewed_seconds: Annotated[float, Field(gt=0, le=86_400)] = 300.0
    """How often its keys are fetched: for so long a key that it withdrew is still trusted."""
    unknown_key_seconds: Annotated[float, Field(gt=0, le=3_600)] = 10.0
    """A token with a key that nobody knows has the keys fetched at once, but not more often than this."""
    keys_kept_seconds: Annotated[float, Field(gt=0, le=2_592_000)] = 86_400.0
    """For so long its keys serve while it is away; then no token can be checked."""
    tls: TlsFiles = Field(default_factory=TlsFiles)
    """Where the provider's certificate is of an authority of your own."""

    @field_validator("issuer", "audience", "jwks_url", mode="before")
    @classmethod
    def _given(cls, value: object) -> object:
        """Compose files give an empty value where there is none."""
        return None if value == "" else value

    @field_validator("issuer", "jwks_url")
    @classmethod
    def _an_address(cls, value: str | None) -> str | None:
        if value is None:
            return None
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or parts.fragment:
            raise ValueError("must be an address https://…, without a password or a fragment")
        return value

    @field_validator("roles")
    @classmethod
    def _known(cls, roles: dict[str, frozenset[str]]) -> dict[str, frozenset[str]]:
        if unknown := sorted(frozenset().union(*roles.values()) - set(keys.SCOPES)):
            raise ValueError(f"there is no scope {', '.join(unknown)}; there are {', '.join(keys.SCOPES)}")
        return roles

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.issuer is None and (useless := [name for name in _NEEDS_AN_ISSUER if getattr(self, name)]):
            raise ValueError(f"{', '.join(useless)} without an issuer has no effect: set issuer")
        if self.issuer is not None and self.audience is None:
            raise ValueError("audience is needed with an issuer, else its tokens for others would open this door")
        if self.keys_kept_seconds < self.keys_renewed_seconds:
            raise ValueError("keys_kept_seconds must not be below keys_renewed_seconds")
        return self

    @property
    def is_encrypted(self) -> bool:
        """Whether all that is fetched comes by https; what is discovered there does, too."""
        return all(url is None or url.startswith("https://") for url in (self.issuer, self.jwks_url))

    @property
    def trust(self) -> Trust | None:
        """Whose tokens are taken; None where nobody's are."""
        if self.issuer is None or self.audience is None:
            return None
        return Trust(self.issuer, self.audience, self.algorithms, timedelta(seconds=self.leeway_seconds))

    @property
    def rights(self) -> Rights:
        """Where tokens say what they may do."""
        return Rights(self.tenant_claim, self.scopes_claim, self.roles_claim, self.roles)
