"""What the proxy's own pages under `/-/` need of a caller: nothing, any role, or an action of their own."""

from __future__ import annotations

from typing import NamedTuple

from mlflow_proxy.access.policy import OWN_PREFIX


class OwnPage(NamedTuple):
    """A page: its `route` for the log, and the `action` that a role must allow.

    `stranger`: it is for those who are not identified yet. An empty action means that any role will do, or that the
    page judges by itself, as those do that are about one target.
    """

    route: str
    action: str = ""
    stranger: bool = False
    writes: bool = False


_PAGES = {
    "/-/": OwnPage("/-/"),
    "/-/version": OwnPage("/-/version"),
    "/-/ready": OwnPage("/-/ready", f"{OWN_PREFIX}GetReadiness"),
    "/-/metrics": OwnPage("/-/metrics", f"{OWN_PREFIX}GetMetrics"),
    "/-/sign-in": OwnPage("/-/sign-in", stranger=True),
    "/-/signed-in": OwnPage("/-/signed-in", stranger=True),
    "/-/sign-out": OwnPage("/-/sign-out", stranger=True),
}
_UI = "/-/ui/"
_LINK = OwnPage(f"{_UI}{{target}}", writes=True)
_NONE = OwnPage("/-/unknown")


def own_page(path: str) -> OwnPage:
    """The page at a canonical path below `/-/`."""
    return _PAGES.get(path) or (_LINK if path.startswith(_UI) else _NONE)
