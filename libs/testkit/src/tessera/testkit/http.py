"""HTTP as a test speaks it: every request on a connection of its own, as strangers do, but without what makes that dear."""

import ssl
from typing import Any, Final

import httpx

_TRUST: Final = ssl.create_default_context()
"""Made once: httpx reads the machine's certificates again for every client, 25 ms of a processor where the request itself takes one."""
_FRESH: Final = httpx.Limits(max_keepalive_connections=0)


def http_client(**options: Any) -> httpx.Client:
    """A client that keeps no connection; `options` are httpx's. The caller closes it."""
    return httpx.Client(verify=_TRUST, limits=_FRESH, **options)


_ANYONE: Final = http_client()


def http_request(method: str, url: str, **options: Any) -> httpx.Response:
    """What `httpx.request` does. Raises its errors. Blocks; may be called from several threads."""
    return _ANYONE.request(method, url, **options)
