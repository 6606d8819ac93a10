"""Consistency tokens: what a write was, or how far an answer was, in a form that only this platform can make (docs/consistency.md).

A token is the URL-safe Base64 of: version, time, events (identity, body, place), ends of partitions, and the first 16 bytes of an
HMAC-SHA-256 over the tenant and all of that. It holds digests and offsets, no name of a tenant and no id.
"""

import base64
import binascii
import hashlib
import hmac
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from tessera.contracts.catalogue import TOPICS, ingestion_topic
from tessera.contracts.events import AwaitedWrite, LogEnd, LogPlace
from tessera.gateway.domain.errors import ApiError

LIFETIME: Final = TOPICS["ingest"].retention or timedelta(days=7)
"""As long as the log holds what a token may wait for."""
LONGEST_TOKEN: Final = 64_000
"""Characters; a token of a full batch has some 30,000."""
MOST_WRITES: Final = 2_000
"""Events that one read may wait for."""
_VERSION: Final = 1
_SKEW: Final = timedelta(minutes=5)
_MAC_BYTES: Final = 16
_HEAD: Final = struct.Struct(">BQHH")
_WRITE: Final = struct.Struct(">16s16sBIQ")
_END: Final = struct.Struct(">BIQ")
_NOWHERE, _SHARED, _OWN = 0, 1, 2


@dataclass(frozen=True)
class Token:
    """What a reader may wait for: events, and everything below these ends."""

    writes: tuple[AwaitedWrite, ...] = ()
    ends: tuple[LogEnd, ...] = ()


class Tokens:
    """Makes and reads tokens. All replicas need the same secret."""

    def __init__(self, secret: bytes) -> None:
        self._key = hmac.digest(secret, b"tessera consistency token", "sha256")

    def issued(self, tenant_id: str, token: Token, *, now: datetime | None = None) -> str:
        """The token's text. Ends of topics that this tenant's events never come on are left out."""
        topics = _topics(tenant_id)
        moment = int((now or datetime.now(UTC)).timestamp() * 1000)
        ends = [end for end in token.ends if end.topic in topics]
        head = _HEAD.pack(_VERSION, moment, len(token.writes), len(ends))
        payload = head + b"".join([_packed_write(write, topics) for write in token.writes] + [_packed_end(end, topics) for end in ends])
        return _text(payload + self._mac(tenant_id, payload))

    def read(self, tenant_id: str, text: str, *, param: str, now: datetime | None = None) -> Token:
        """What the token names.

        Raises ApiError 400 `consistency_token_invalid` for what this platform did not issue to this tenant, `consistency_token_expired`.
        """
        payload = self._checked(tenant_id, text)
        if payload is None:
            raise _invalid(param)
        _, moment, writes, _ = _HEAD.unpack_from(payload)
        age = (now or datetime.now(UTC)) - datetime.fromtimestamp(moment / 1000, UTC)
        if age < -_SKEW:
            raise _invalid(param)
        if age > LIFETIME:
            days = LIFETIME.days
            raise ApiError(400, "consistency_token_expired", f"A consistency token can be used for {days} days.", param=param)
        return _unpacked(payload[_HEAD.size :], writes, tenant_id)

    def _checked(self, tenant_id: str, text: str) -> bytes | None:
        """The payload, where it is whole and of this tenant. What the secret vouches for is well formed, if it is of a known version."""
        try:
            raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        except (ValueError, binascii.Error):
            return None
        payload, mac = raw[:-_MAC_BYTES], raw[-_MAC_BYTES:]
        genuine = _text(raw) == text and hmac.compare_digest(mac, self._mac(tenant_id, payload))
        return payload if genuine and payload[:1] == bytes([_VERSION]) else None

    def _mac(self, tenant_id: str, payload: bytes) -> bytes:
        return hmac.new(self._key, tenant_id.encode() + b"\x00" + payload, hashlib.sha256).digest()[:_MAC_BYTES]


def merged(tokens: Iterable[Token], *, param: str) -> Token:
    """All of what several tokens name. Raises ApiError 400 `consistency_token_invalid` for more than one read may wait for."""
    writes: dict[str, AwaitedWrite] = {}
    ends: dict[tuple[str, int], LogEnd] = {}
    for token in tokens:
        writes |= {write.identity + write.body: write for write in token.writes}
        for end in token.ends:
            place = (end.topic, end.partition)
            ends[place] = max(ends.get(place, end), end, key=lambda one: one.next_offset)
    if len(writes) > MOST_WRITES:
        raise ApiError(400, "consistency_token_invalid", f"One read may wait for at most {MOST_WRITES} writes.", param=param)
    return Token(tuple(writes.values()), tuple(ends.values()))


def _text(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def _invalid(param: str) -> ApiError:
    return ApiError(400, "consistency_token_invalid", "This is no consistency token that was issued to this tenant.", param=param)


def _topics(tenant_id: str) -> dict[str, int]:
    return {TOPICS["ingest"].name: _SHARED, ingestion_topic(tenant_id): _OWN}


def _packed_write(write: AwaitedWrite, topics: dict[str, int]) -> bytes:
    place = write.place if write.place is not None and write.place.topic in topics else None
    where = (topics[place.topic], place.partition, place.offset) if place else (_NOWHERE, 0, 0)
    return _WRITE.pack(bytes.fromhex(write.identity), bytes.fromhex(write.body), *where)


def _packed_end(end: LogEnd, topics: dict[str, int]) -> bytes:
    return _END.pack(topics[end.topic], end.partition, end.next_offset)


def _unpacked(body: bytes, writes: int, tenant_id: str) -> Token:
    topics = {place: topic for topic, place in _topics(tenant_id).items()}
    middle = writes * _WRITE.size
    return Token(
        tuple(
            AwaitedWrite(
                identity=identity.hex(),
                body=digest.hex(),
                place=LogPlace(topic=topics[topic], partition=partition, offset=offset) if topic in topics else None,
            )
            for identity, digest, topic, partition, offset in _WRITE.iter_unpack(body[:middle])
        ),
        tuple(
            LogEnd(topic=topics[topic], partition=partition, next_offset=end) for topic, partition, end in _END.iter_unpack(body[middle:])
        ),
    )
