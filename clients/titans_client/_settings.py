"""Where the server is and how long to wait for it: what both clients are made from."""

import os
from dataclasses import dataclass, field
from typing import Any

import httpx

DEFAULT_BASE_URL = "http://127.0.0.1:8000"
MAX_IDLE = 20  # connections kept for what comes next


@dataclass(frozen=True)
class Settings:
    """What holds for all of a client's calls."""

    base_url: str
    api_key: str | None = field(repr=False)
    timeout: float | None  # seconds to connect, and for answers that cost no work
    work_timeout: float | None  # seconds of silence while a document is learnt or an answer made
    max_retries: int

    @classmethod
    def resolve(
        cls,
        base_url: str | None,
        api_key: str | None,
        timeout: float | None,
        work_timeout: float | None,
        max_retries: int,
    ) -> "Settings":
        """Fill up from TITANS_BASE_URL and TITANS_API_KEY. Raises ValueError for an address or a key that is none."""
        base_url = base_url or os.environ.get("TITANS_BASE_URL") or DEFAULT_BASE_URL
        api_key = api_key or os.environ.get("TITANS_API_KEY") or None
        try:
            url = httpx.URL(base_url)
        except httpx.InvalidURL as error:
            raise ValueError(f"not a server's address: {base_url!r} ({error})") from None
        if url.scheme not in {"http", "https"} or not url.host or not 0 < (url.port or 80) < 2**16:
            raise ValueError(f"not a server's address: {base_url!r} (expected http://host:port)")
        if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key == api_key.strip()):
            raise ValueError("not an API key: it is not printable ASCII, or has space around it (a line's end, maybe)")
        return cls(base_url, api_key, timeout, work_timeout, max_retries)

    def client_arguments(self) -> dict[str, Any]:
        """What `httpx.Client` and `httpx.AsyncClient` are made with.

        There are as many connections as requests. A stream has its own until it ends, and httpx's default is a hundred:
        what comes then would wait for one, as if the server were silent.
        """
        headers = {"User-Agent": "titans-client", "Accept": "application/json"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=MAX_IDLE)
        return {
            "base_url": self.base_url,
            "headers": headers,
            "timeout": httpx.Timeout(self.timeout),
            "limits": limits,
        }

    def timeout_for(self, *, work: bool) -> httpx.Timeout:
        """Work holds up both ways: the server reads a document no faster than it learns it."""
        return httpx.Timeout(self.work_timeout, connect=self.timeout) if work else httpx.Timeout(self.timeout)
