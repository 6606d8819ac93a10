"""An OpenID provider on the loop-back interface: its configuration, its keys, and tokens as it would sign them."""

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey

AUDIENCE: Final = "tessera"

_CURVES: dict[str, type[ec.EllipticCurve]] = {"ES256": ec.SECP256R1, "ES384": ec.SECP384R1, "ES512": ec.SECP521R1}


@dataclass(frozen=True)
class SigningKey:
    """A key pair with the id and the algorithm that it is published with."""

    id: str | None
    algorithm: str
    private: PrivateKey

    def jwk(self, **more: Any) -> dict[str, Any]:
        """The public half as it is published (RFC 7517)."""
        public = jwt.get_algorithm_by_name(self.algorithm).to_jwk(self.private.public_key(), as_dict=True)
        named = {} if self.id is None else {"kid": self.id}
        return {**{name: value for name, value in public.items() if name != "key_ops"}, "use": "sig", **named, **more}


def signing_key(key_id: str | None = "first", algorithm: str = "ES256", *, rsa_bits: int = 2048) -> SigningKey:
    """A new key pair. Those of RSA take a while."""
    made: PrivateKey
    if algorithm in _CURVES:
        made = ec.generate_private_key(_CURVES[algorithm]())
    elif algorithm == "EdDSA":
        made = ed25519.Ed25519PrivateKey.generate()
    else:
        made = rsa.generate_private_key(public_exponent=65_537, key_size=rsa_bits)
    return SigningKey(key_id, algorithm, made)


def token(key: SigningKey, issuer: str, audience: str = AUDIENCE, *, headers: dict[str, Any] | None = None, **claims: Any) -> str:
    """A token of one minute for `ada` of the tenant `default`; a claim that is None is left out."""
    now = int(time.time())
    said = {"iss": issuer, "aud": audience, "sub": "ada", "tenant": "default", "iat": now, "exp": now + 60, **claims}
    named = {} if key.id is None else {"kid": key.id}
    present = {name: value for name, value in said.items() if value is not None}
    return jwt.encode(present, key.private, key.algorithm, headers={**named, **(headers or {})})


@dataclass
class LocalIssuer:
    """Publishes `keys`, of which the last signs."""

    keys: list[SigningKey] = field(default_factory=lambda: [signing_key()])
    asked: list[str] = field(default_factory=list)
    """The paths of all requests."""
    url: str = ""
    port: int = 0

    def token(self, **claims: Any) -> str:
        """As `token` makes it, by this issuer."""
        return token(self.keys[-1], self.url, **claims)

    def settings(self) -> dict[str, str]:
        """What makes a gateway take its tokens."""
        said = {"ISSUER": self.url, "AUDIENCE": AUDIENCE, "ALGORITHMS": '["ES256"]'}
        return {f"TESSERA_GATEWAY__OIDC__{name}": value for name, value in said.items()}

    def rotate(self, key: SigningKey, *, keep: Sequence[SigningKey] = ()) -> None:
        """From now on this key signs; it is published beside those that are kept."""
        self.keys = [*keep, key]

    @contextmanager
    def running(self) -> Iterator["LocalIssuer"]:
        """Serves until the block ends. Set `url` where it is reached by another address than that of `port`."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.port = server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        serving = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        serving.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            serving.join()

    def document(self, path: str) -> dict[str, Any] | None:
        """What is published there."""
        documents: dict[str, dict[str, Any]] = {
            "/.well-known/openid-configuration": {"issuer": self.url, "jwks_uri": f"{self.url}/keys"},
            "/keys": {"keys": [key.jwk() for key in self.keys]},
        }
        return documents.get(path)


def _handler(issuer: LocalIssuer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            issuer.asked.append(self.path)
            document = issuer.document(self.path)
            self.send_response(404 if document is None else 200)
            self.send_header("content-type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(document).encode())

        def log_message(self, *_: Any) -> None:
            """Not on a test's output."""

    return Handler
