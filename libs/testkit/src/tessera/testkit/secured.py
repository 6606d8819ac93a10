"""A stack on which nothing is reached without TLS, and nobody does on Kafka what no access control list allows."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from tessera.local.certificates import Authority, Certificate
from tessera.local.environment import SERVICES
from tessera.local.kafka import Kafka, KafkaSecurity, cached_distribution
from tessera.local.ports import LOOPBACK, free_ports
from tessera.testkit.stack import Stack
from tessera.testkit.tls_proxy import TlsProxy

KEY_PASSWORD = "only-for-tests-key"  # noqa: S105  # nosec B105  # pragma: allowlist secret - the key lives for one test run
MUTUAL = ("generator", "retention", "validator")
"""Services that show a certificate, with an encrypted key; the others have a password (SCRAM)."""
ADMINISTRATOR = "admin"


def principal(service: str) -> str:
    """The user of a service, and the common name of its certificate."""
    return f"tessera-{service}"


@dataclass
class SecuredStack(Stack):
    """Always starts a Kafka of its own; Postgres and Redis are the usual ones, behind proxies that end TLS for the services.

    `users` may log in beside the administrator and the services.
    """

    users: Sequence[str] = ()
    authority: Authority = field(init=False)
    passwords: dict[str, str] = field(default_factory=dict)
    postgres_proxy: TlsProxy = field(init=False)
    redis_proxy: TlsProxy = field(init=False)
    _certificates: dict[str, Certificate] = field(default_factory=dict)

    @property
    def is_secured(self) -> bool:
        """It is."""
        return True

    def environment(self, service: str | None) -> dict[str, str]:
        """TLS to all three servers, and the credentials of a service; of the administrator where None."""
        return {
            **self._kafka_environment(service),
            "TESSERA__KAFKA__TLS__CA_FILE": str(self.authority.ca_file),
            "TESSERA__POSTGRES__HOST": LOOPBACK,
            "TESSERA__POSTGRES__PORT": str(self.postgres_proxy.port),
            "TESSERA__POSTGRES__TLS__MODE": "verify-full",
            "TESSERA__POSTGRES__TLS__CA_FILE": str(self.authority.ca_file),
            "TESSERA__REDIS__URL": self._encrypted_redis_url(),
            "TESSERA__REDIS__TLS__CA_FILE": str(self.authority.ca_file),
        }

    def client(self, user: str) -> dict[str, str]:
        """How a client of librdkafka logs in as `user`."""
        return {
            "bootstrap.servers": self.kafka_bootstrap_servers,
            "security.protocol": "SASL_SSL",
            "ssl.ca.location": str(self.authority.ca_file),
            "sasl.mechanism": "SCRAM-SHA-512",
            "sasl.username": user,
            "sasl.password": self.passwords[user],
        }

    def mutual_client(self, service: str) -> dict[str, str]:
        """The same with the service's certificate."""
        shown = self._certificates[service]
        return {
            "bootstrap.servers": self._secured_kafka().mutual_bootstrap_servers,
            "security.protocol": "SSL",
            "ssl.ca.location": str(self.authority.ca_file),
            "ssl.certificate.location": str(shown.certificate_file),
            "ssl.key.location": str(shown.key_file),
            "ssl.key.password": KEY_PASSWORD,
        }

    def _kafka_environment(self, service: str | None) -> dict[str, str]:
        if service in MUTUAL:
            shown = self._certificates[service]
            return {
                "TESSERA__KAFKA__BOOTSTRAP_SERVERS": self._secured_kafka().mutual_bootstrap_servers,
                "TESSERA__KAFKA__SECURITY_PROTOCOL": "SSL",
                "TESSERA__KAFKA__TLS__CERTIFICATE_FILE": str(shown.certificate_file),
                "TESSERA__KAFKA__TLS__KEY_FILE": str(shown.key_file),
                "TESSERA__KAFKA__TLS__KEY_PASSWORD": KEY_PASSWORD,
            }
        user = ADMINISTRATOR if service is None else principal(service)
        return {
            "TESSERA__KAFKA__SECURITY_PROTOCOL": "SASL_SSL",
            "TESSERA__KAFKA__SASL_USERNAME": user,
            "TESSERA__KAFKA__SASL_PASSWORD": self.passwords[user],
        }

    def _provide_kafka(self) -> None:
        self.authority = Authority(self.folder / "authority")
        self.authority.create()
        self.passwords = {user: secrets.token_hex(12) for user in (ADMINISTRATOR, *map(principal, SERVICES), *self.users)}
        self._certificates = {name: self.authority.issue(principal(name), password=KEY_PASSWORD) for name in SERVICES}
        distribution = cached_distribution()
        distribution.ensure()
        ports = free_ports(("broker", "controller", "mutual"))
        security = KafkaSecurity(self.authority, self.passwords, ports["mutual"])
        self.kafka = Kafka(self.folder / "kafka", ports["broker"], ports["controller"], distribution, self.kafka_limits, security=security)
        self._own(self.kafka)
        self.kafka_bootstrap_servers = self.kafka.bootstrap_servers

    def _provide_postgres(self) -> None:
        super()._provide_postgres()
        self.postgres_proxy = self._proxy(self.database_url, postgres=True)

    def _provide_redis(self) -> None:
        super()._provide_redis()
        self.redis_proxy = self._proxy(self.redis_url)

    def _proxy(self, url: str, **options: Any) -> TlsProxy:
        proxy = TlsProxy(urlsplit(url).port or 0, self.authority.issue("server"), **options)
        self._cleanup.callback(proxy.stop)
        proxy.start()
        return proxy

    def _encrypted_redis_url(self) -> str:
        parts = urlsplit(self.redis_url)
        credentials = parts.netloc.rpartition("@")[0]
        address = f"{LOOPBACK}:{self.redis_proxy.port}"
        return urlunsplit(parts._replace(scheme="rediss", netloc=f"{credentials}@{address}" if credentials else address))

    def _secured_kafka(self) -> Kafka:
        if self.kafka is None:
            raise RuntimeError("the stack was not started")
        return self.kafka
