"""What a configuration lays open that its operator may not know of. It is allowed, so it is told, not refused."""

from __future__ import annotations

from collections.abc import Iterator

from mlflow_proxy.settings import Settings


def exposures(settings: Settings) -> Iterator[str]:
    """A sentence or two each: what is open to whom, and the ways out."""
    server = settings.server
    if settings.listens_on_loopback:
        return
    if not settings.identifies:
        yield "callers are not identified; whoever reaches this address has the AWS rights."
    if server.tls_certificate is None and not server.trusted_proxies and not _is_https(server.public_url):
        yield (
            f"server.host {server.host} can be reached from other machines without TLS: keys, tokens, cookies and "
            "answers travel unencrypted. Set server.tls_certificate and server.tls_key; or let a server in front speak "
            "HTTPS, and name its network in server.trusted_proxies and its address in server.public_url; or listen on "
            "127.0.0.1."
        )


def _is_https(url: str | None) -> bool:
    return url is not None and url.lower().startswith("https://")
