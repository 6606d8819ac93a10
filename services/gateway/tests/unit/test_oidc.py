"""Access tokens: which open something, what they open, and that every other is the same 401."""

import base64
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tessera.gateway.adapters.access_tokens import JwtAccessTokens
from tessera.gateway.adapters.issuer import IssuerKeys, Jwk
from tessera.gateway.domain import keys, oidc
from tessera.gateway.domain.oidc import Rights, TokenExpiredError, TokenRefusedError, Trust
from tessera.gateway.handlers.access import Authenticator
from tessera.gateway.handlers.tokens import TokenAuthenticator
from tessera.resilience import Breaker
from tessera.testkit.issuer import SigningKey, signing_key, token

pytestmark = pytest.mark.unit

ISSUER = "https://login.example.com/realms/tessera"
RIGHTS = Rights(scopes_of_role={"operator": frozenset({"admin"}), "analyst": frozenset({"inference", "memory:read"})})

FIRST, SECOND = signing_key("first"), signing_key("second")
RSA = signing_key("rsa", "RS256")
STRANGER = signing_key("first")
"""Of another issuer, under an id that is published here."""


@dataclass
class Published:
    """`issuer.KeySource` in memory."""

    published: Sequence[Jwk] = ()

    async def keys(self) -> Sequence[Jwk]:
        return self.published


@dataclass
class Directory:
    """`ports.ActiveTenants` in memory."""

    active: set[str] = field(default_factory=lambda: {"default", "acme"})
    asked: int = 0

    async def is_active(self, tenant_id: str) -> bool:
        self.asked += 1
        return tenant_id in self.active


def door(
    *published: SigningKey,
    algorithms: Sequence[oidc.Algorithm] = ("RS256", "ES256"),
    rights: Rights = RIGHTS,
    tenants: Directory | None = None,
) -> TokenAuthenticator:
    """Whatever is behind the header, with keys in memory."""
    trust = Trust(ISSUER, "tessera", frozenset(algorithms), timedelta(seconds=5))
    source = Published([key.jwk() for key in published or (FIRST, SECOND, RSA)])
    found = IssuerKeys(source, trust.algorithms, Breaker("issuer"))
    return TokenAuthenticator(JwtAccessTokens(found, trust), tenants or Directory(), ISSUER, rights)


def made(key: SigningKey = FIRST, **options: Any) -> str:
    return token(key, ISSUER, **options)


def segment(content: Any) -> str:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def parts(text: str) -> list[str]:
    return text.split(".")


def headed(header: Any) -> str:
    """A good token under another header, whose signature no longer fits."""
    return ".".join([segment(header), *parts(made())[1:]])


def signed(header: dict[str, Any], payload: bytes, key: SigningKey = FIRST) -> str:
    """By the issuer, whatever the payload is."""
    return jwt.api_jws.encode(payload, key.private, key.algorithm, headers={"kid": key.id, **header})


def forged_with_the_public_key(secret: bytes) -> str:
    """The old trick: what everybody may read as the secret of HS256."""
    beginning = f"{segment({'alg': 'HS256', 'typ': 'JWT', 'kid': 'rsa'})}.{parts(made())[1]}"
    return f"{beginning}.{segment(hmac.new(secret, beginning.encode(), hashlib.sha256).digest())}"


def public_pem() -> bytes:
    return RSA.private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def claims_of_a_good_one(**changes: Any) -> bytes:
    now = int(time.time())
    return json.dumps({"iss": ISSUER, "aud": "tessera", "sub": "ada", "tenant": "default", "iat": now, "exp": now + 60, **changes}).encode()


REFUSED: dict[str, Callable[[], str]] = {
    # algorithms
    "an algorithm that is not trusted": lambda: made(replace(RSA, algorithm="PS256")),
    "none": lambda: f"{segment({'alg': 'none', 'typ': 'JWT'})}.{parts(made())[1]}.",
    "none with a signature": lambda: headed({"alg": "none", "kid": "first"}),
    "None": lambda: headed({"alg": "None", "kid": "first"}),
    "HS256 with the public key in PEM": lambda: forged_with_the_public_key(public_pem()),
    "HS256 with the public key in JWK": lambda: forged_with_the_public_key(json.dumps(RSA.jwk()).encode()),
    "an algorithm of another key's type": lambda: made(replace(SECOND, id="rsa")),
    "no algorithm": lambda: headed({"kid": "first"}),
    "an algorithm that is no text": lambda: headed({"alg": ["ES256"], "kid": "first"}),
    # keys
    "an unknown key": lambda: made(replace(STRANGER, id="third")),
    "another's key under a known id": lambda: made(STRANGER),
    "no id where there are several keys": lambda: made(replace(FIRST, id=None)),
    "an id that is no text": lambda: headed({"alg": "ES256", "kid": 1}),
    "a key that it brings along": lambda: made(replace(STRANGER, id="x"), headers={"jwk": STRANGER.jwk(kid="x")}),
    "an address of keys that it brings along": lambda: made(replace(STRANGER, id="x"), headers={"jku": "https://evil.example/keys"}),
    # whose and for whom
    "another issuer": lambda: made(iss="https://login.example.com/realms/other"),
    "an issuer that only begins so": lambda: made(iss=ISSUER + "/"),
    "no issuer": lambda: made(iss=None),
    "issuers": lambda: signed({}, claims_of_a_good_one(iss=[ISSUER])),
    "another audience": lambda: made(aud="other"),
    "no audience": lambda: made(aud=None),
    "an audience that is no text": lambda: made(aud=[{"tessera": True}]),
    # times
    "not yet": lambda: made(nbf=int(time.time()) + 60),
    "issued tomorrow": lambda: made(iat=int(time.time()) + 86_400),
    "issued never": lambda: made(iat="yesterday"),
    "no end": lambda: made(exp=None),
    "an end that is no number": lambda: made(exp="never"),
    "an end that is no number at all": lambda: signed({}, claims_of_a_good_one().replace(b'"exp": ', b'"exp": NaN, "was": ')),
    "an endless end": lambda: signed({}, claims_of_a_good_one().replace(b'"exp": ', b'"exp": 1e999, "was": ')),
    # who
    "no subject": lambda: made(sub=None),
    "an empty subject": lambda: made(sub=""),
    "a subject that is no text": lambda: signed({}, claims_of_a_good_one(sub=7)),
    "too long a subject": lambda: made(sub="a" * 256),
    "half a character": lambda: made(sub="\ud800"),
    "no tenant": lambda: made(tenant=None),
    "a tenant that does not exist": lambda: made(tenant="nobody"),
    "a tenant that is no name": lambda: made(tenant="default\x00"),
    "a tenant that ends a line": lambda: made(tenant="default\n"),
    "tenants": lambda: made(tenant=["default"]),
    # what it is
    "an ID of a logout": lambda: made(headers={"typ": "logout+jwt"}),
    "a type that is no text": lambda: made(headers={"typ": ["JWT"]}),
    "a critical extension": lambda: made(headers={"crit": ["x"], "x": 1}),
    "a payload that is apart": lambda: headed({"alg": "ES256", "kid": "first", "b64": False, "crit": ["b64"]}),
    "a payload that is no object": lambda: signed({"typ": "JWT"}, b'["default"]'),
    "a payload that is no JSON": lambda: signed({"typ": "JWT"}, b"\xff\xfe"),
    "a payload without a bottom": lambda: signed({"typ": "JWT"}, b"[" * 8_000),
    # how it is written
    "other claims under the signature": lambda: ".".join(
        [parts(made())[0], segment(claims_of_a_good_one(tenant="acme")), parts(made())[2]]
    ),
    "another signature": lambda: ".".join([*parts(made())[:2], parts(made())[2]]) + "A",
    "no signature": lambda: ".".join([*parts(made())[:2], ""]),
    "a header that is no object": lambda: headed(["ES256"]),
    "a header that is no JSON": lambda: headed(b"\xff"),
    "a header without a bottom": lambda: headed(b"[" * 8_000),
    "padding": lambda: made() + "==",
    "encrypted": lambda: made() + ".a.b",
    "two parts": lambda: ".".join(parts(made())[:2]),
    "too long": lambda: made(more="x" * oidc.MAXIMUM_TOKEN_LENGTH),
    "far too long": lambda: "e." * 500_000,
    "spaces": lambda: made().replace(".", " . "),
    "dots": lambda: "..",
    "odd characters": lambda: "päss wörd\t\x7f",
    "a word": lambda: "nonsense",
    "another maker's key": lambda: "sk-proj-0123456789",
}


@pytest.fixture(scope="module")
def tokens() -> TokenAuthenticator:
    return door()


@pytest.fixture
def guarded(desk: Any, tokens: TokenAuthenticator) -> Any:
    """The application with a provider, beside its keys."""
    desk.rooms = replace(desk.rooms, authenticator=Authenticator(desk.store, b"pepper", tokens))
    return desk


@pytest.fixture
async def client(guarded: Any) -> AsyncIterator[httpx.AsyncClient]:
    async with guarded.client() as opened:
        yield opened


@pytest.mark.parametrize("name", REFUSED)
async def test_every_other_token_is_the_same_401(client: httpx.AsyncClient, name: str) -> None:
    answer = await client.get("/v1/models", headers=[(b"authorization", f"Bearer {REFUSED[name]()}".encode("latin-1"))])
    error = {"message": "Incorrect API key or access token provided.", "type": "invalid_request_error", "param": None}
    assert (answer.status_code, answer.json()) == (401, {"error": {**error, "code": "invalid_api_key"}})
    assert answer.headers["www-authenticate"] == 'Bearer error="invalid_token"'


async def test_one_whose_time_is_over_says_so_and_only_where_the_issuer_signed_it(guarded: Any) -> None:
    past = int(time.time()) - 60
    async with guarded.client(made(exp=past)) as client:
        answer = await client.get("/v1/models")
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "token_expired")
    assert answer.headers["www-authenticate"] == 'Bearer error="invalid_token"'
    async with guarded.client(made(STRANGER, exp=past)) as client:
        assert (await client.get("/v1/models")).json()["error"]["code"] == "invalid_api_key"


async def test_a_token_opens_what_its_scopes_say_and_keys_go_on(guarded: Any) -> None:
    async with guarded.client(made(scope="openid inference")) as client:
        assert (await client.get("/v1/models")).status_code == 200
        refused = await client.get("/v1/tenants")
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "missing_scope")
    async with guarded.client() as client:
        assert (await client.get("/v1/tenants")).status_code == 200
    async with guarded.client("tsr_test_nonsense") as client:
        assert "access token" not in (await client.get("/v1/models")).json()["error"]["message"]


async def test_without_a_provider_a_token_is_a_wrong_key(desk: Any) -> None:
    async with desk.client(made()) as client:
        answer = await client.get("/v1/models")
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")


@pytest.mark.parametrize("algorithm", oidc.ALGORITHMS)
async def test_each_algorithm_can_be_trusted(algorithm: oidc.Algorithm) -> None:
    key = replace(RSA, algorithm=algorithm) if algorithm[0] in "RP" else signing_key("k", algorithm)
    principal = await door(key, algorithms=[algorithm]).principal(made(key))
    assert (principal.tenant_id, principal.user, principal.scopes) == ("default", "ada", frozenset())


def test_no_algorithm_with_a_secret_can_be_trusted() -> None:
    assert all(jwt.get_algorithm_by_name(name).__class__.__name__ not in ("HMACAlgorithm", "NoneAlgorithm") for name in oidc.ALGORITHMS)


@pytest.mark.parametrize("kind", ["JWT", "jwt", "at+jwt", "application/at+jwt", "application/jwt"])
async def test_the_types_of_access_tokens(tokens: TokenAuthenticator, kind: str) -> None:
    assert (await tokens.principal(made(headers={"typ": kind}))).user == "ada"


async def test_clocks_may_differ_a_little(tokens: TokenAuthenticator) -> None:
    now = int(time.time())
    assert await tokens.principal(made(exp=now - 2, nbf=now + 2, iat=now + 2))
    assert await tokens.principal(made(aud=["other", "tessera"], iat=None))


async def test_the_only_key_needs_no_id() -> None:
    nameless = replace(FIRST, id=None)
    assert await door(nameless).principal(made(nameless))
    assert await door(FIRST, RSA).principal(made(nameless)), "the other is of another type"


@pytest.mark.parametrize(
    "unfit",
    [
        {"use": "enc"},
        {"key_ops": ["encrypt"]},
        {"key_ops": "verify"},
        {"alg": "RS256"},
        {"kty": "oct", "k": "c2VjcmV0"},
        {"kty": "none"},
        {"crv": "P-384"},
        {"x": "AAAA"},
        {"x": 1},
        {"x": None},
        {"d": "c2VjcmV0"},
        {"kid": ["first"]},
    ],
)
async def test_a_key_that_is_not_for_this_checks_nothing_and_the_others_go_on(unfit: dict[str, Any]) -> None:
    found = IssuerKeys(Published([FIRST.jwk(**unfit), SECOND.jwk()]), ["ES256"], Breaker("issuer"))
    assert await found.find("ES256", "first") is None
    assert await found.find("ES256", "second") is not None


async def test_a_weak_key_checks_nothing() -> None:
    weak = signing_key("weak", "RS256", rsa_bits=1_024)
    found = IssuerKeys(Published([weak.jwk()]), ["RS256"], Breaker("issuer"))
    assert await found.find("RS256", "weak") is None


async def test_two_keys_of_one_id_are_none() -> None:
    found = IssuerKeys(Published([FIRST.jwk(), STRANGER.jwk()]), ["ES256"], Breaker("issuer"))
    assert await found.find("ES256", "first") is None


# --- what it may do ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("claims", "scopes"),
    [
        ({}, set()),
        ({"scope": "openid memory:read  inference unknown"}, {"memory:read", "inference"}),
        ({"scope": ["inference", "retention", 7, ["validation"]]}, {"inference", "retention"}),
        ({"scope": ["inference retention"]}, set()),
        ({"scope": "INFERENCE"}, set()),
        ({"scope": {"inference": True}}, set()),
        ({"scope": "admin inference"}, {"inference"}),
        ({"roles": ["operator"]}, {"admin"}),
        ({"roles": "analyst"}, {"inference", "memory:read"}),
        ({"roles": "analyst operator"}, set()),
        ({"roles": ["Operator", "nobody", None, {}]}, set()),
        ({"roles": ["analyst"], "scope": "validation"}, {"inference", "memory:read", "validation"}),
        ({"roles": {"operator": 1}}, set()),
        ({"roles": True, "scope": 1}, set()),
    ],
)
def test_scopes_are_what_is_known_and_nothing_else(claims: dict[str, Any], scopes: set[str]) -> None:
    assert RIGHTS.of(claims) == scopes


def test_a_claim_is_named_or_pointed_at() -> None:
    claims = {"https://example.com/tenant": "a", "realm_access": {"roles": ["r"], "a/b~c": 1}, "": "empty", "list": [1]}
    assert oidc.claim(claims, "https://example.com/tenant") == "a"
    assert oidc.claim(claims, "/realm_access/roles") == ["r"]
    assert oidc.claim(claims, "/realm_access/a~1b~0c") == 1
    assert [oidc.claim(claims, name) for name in ("realm_access.roles", "/realm_access/x/y", "/list/0", "/x", "x")] == [None] * 5


async def test_tenant_and_roles_come_from_wherever_they_are_said_to_be() -> None:
    rights = Rights("https://example.com/tenant", "scp", "/realm_access/roles", {"analyst": frozenset({"inference"})})
    claims: dict[str, Any] = {
        "https://example.com/tenant": "acme",
        "scp": ["retention"],
        "realm_access": {"roles": ["analyst"]},
        "tenant": "default",
    }
    principal = await door(rights=rights).principal(made(**claims))
    assert principal.tenant_id == "acme"
    assert principal.scopes == {"retention", "inference"}


def test_the_id_of_a_credential_is_the_subjects_and_no_name() -> None:
    one = oidc.credential_id(ISSUER, "acme", "ada")
    assert one == oidc.credential_id(ISSUER, "acme", "ada")
    assert one.startswith("oidc:")
    assert "ada" not in one
    others = {oidc.credential_id(*other) for other in ((ISSUER + "/", "acme", "ada"), (ISSUER, "other", "ada"), (ISSUER, "acme", "bob"))}
    assert len(others - {one}) == 3


async def test_a_tenant_is_looked_up_once_in_a_while_and_what_is_not_there_each_time() -> None:
    now, tenants = [0.0], Directory()
    tokens = door(tenants=tenants)
    tokens = TokenAuthenticator(tokens._tokens, tenants, ISSUER, RIGHTS, lambda: now[0])
    for _ in range(3):
        await tokens.principal(made())
    assert tenants.asked == 1
    tenants.active.clear()
    now[0] = 4.9
    assert await tokens.principal(made())
    now[0] = 5.0
    for expected in (2, 3):
        with pytest.raises(TokenRefusedError):
            await tokens.principal(made())
        assert tenants.asked == expected
    tenants.active.add("default")
    assert await tokens.principal(made())


# --- whatever is presented --------------------------------------------------------------------------------------------

GOOD = {key.algorithm: token(key, ISSUER, exp=int(time.time()) + 86_400, scope="inference") for key in (FIRST, RSA)}
TEXT = st.text(st.characters(max_codepoint=0x2FF), max_size=3)


@st.composite
def mutations(draw: st.DrawFn) -> str:
    """A good token with something else somewhere."""
    good = draw(st.sampled_from(sorted(GOOD.values())))
    begin = draw(st.integers(0, len(good)))
    end = min(len(good), begin + draw(st.integers(0, 3)))
    return good[:begin] + draw(TEXT) + good[end:]


@given(mutated=mutations())
@example(mutated=next(iter(GOOD.values())) + "=")
@example(mutated=next(iter(GOOD.values()))[:-1] + "_")
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_no_mutated_token_opens_anything(tokens: TokenAuthenticator, mutated: str) -> None:
    if mutated in GOOD.values():
        assert (await tokens.principal(mutated)).scopes == {"inference"}
        return
    with pytest.raises(TokenRefusedError):
        await tokens.principal(mutated)


@given(
    header=st.dictionaries(
        st.sampled_from(["alg", "kid", "typ", "crit", "b64", "x5c", "epk"]),
        st.none() | st.booleans() | st.integers() | st.text(max_size=9) | st.lists(st.text(max_size=5), max_size=2),
    ),
    payload=st.binary(max_size=40),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_whatever_a_header_says_is_a_refusal(tokens: TokenAuthenticator, header: dict[str, Any], payload: bytes) -> None:
    with pytest.raises(TokenRefusedError):
        await tokens.principal(f"{segment(header)}.{segment(payload or b'x')}.{segment(b's' * 64)}")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(claims=st.dictionaries(st.sampled_from(["iss", "aud", "exp", "nbf", "iat", "sub", "jti", "tenant", "scope", "roles"]), JSON))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_whatever_the_issuer_signs_is_understood_or_refused(tokens: TokenAuthenticator, claims: dict[str, Any]) -> None:
    try:
        principal = await tokens.principal(signed({"typ": "JWT"}, claims_of_a_good_one(**claims)))
    except TokenRefusedError:
        return
    assert principal.tenant_id in {"default", "acme"}
    assert principal.scopes <= set(keys.SCOPES)


@given(raw=st.binary(max_size=80))
@example(raw=b"Bearer tsr_test_\x00 \xff")
@example(raw=b"Bearer\x00tsr")
@example(raw=b"Bearer " + b"\xf0\x9f\x98\x80" * 3)
@example(raw=b"bearer " + b"tsr_" * 50_000)
@example(raw=b"Bearer " + b". " * 50_000)
@example(raw=b"Bearer tsr_test_0123456789abcdef_0123456789abcdef0123456789abcdef\xb2\xb3\xb9aaa")
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_no_authorization_is_a_500(client: httpx.AsyncClient, raw: bytes) -> None:
    answer = await client.get("/v1/models", headers=[(b"authorization", raw)])
    assert answer.status_code == 401
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@given(
    name=st.sampled_from(["idempotency-key", "x-request-id", "traceparent", "content-type", "accept", "last-event-id", "origin", "host"]),
    raw=st.binary(max_size=60),
)
@example(name="idempotency-key", raw=b"a b\x00\xff")
@example(name="idempotency-key", raw=b"k" * 100_000)
@example(name="content-type", raw=b"application/json; charset=\x00\xff")
@example(name="traceparent", raw=b"00-\xff-\x00-01")
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_no_other_header_is_a_500(client: httpx.AsyncClient, name: str, raw: bytes) -> None:
    item = {"type": "message", "conversation_id": "c", "role": "user", "content": "x"}
    headers = {b"content-type": b"application/json", name.encode(): raw}
    answer = await client.post("/v1/memories", content=json.dumps(item), headers=headers)
    assert answer.status_code in {202, 400, 415}, answer.text


def test_a_refusal_says_in_the_log_only_what_was_looked_at() -> None:
    assert TokenRefusedError("tenant").reason == "tenant"
    assert (TokenExpiredError().status, TokenExpiredError().code) == (401, "token_expired")
