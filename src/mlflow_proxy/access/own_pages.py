"""What the proxy's own pages under `/-/` need of a caller: nothing, any role, or an action of their own."""

from __future__ import annotations

from typing import NamedTuple

from mlflow_proxy.access.policy import OWN_PREFIX


class OwnPage(NamedTuple):
    """A page: its `route` for the log, and the `action` that a role must allow.

    `stranger`: it is for those who are not identified yet, and `answers_provider` where they show what the identity
    provider gave them. `needs_readiness`: it shows how the targets are, which may have to be asked. `is_link`: the page
    makes a link to one target's UI, and the action is that target's. Otherwise an empty action means that any role
    will do.
    """

    route: str
    action: str = ""
    stranger: bool = False
    answers_provider: bool = False
    needs_readiness: bool = False
    is_link: bool = False


_PAGES = {
    "/-/": OwnPage("/-/"),
    "/-/version": OwnPage("/-/version"),
    "/-/whoami": OwnPage("/-/whoami"),
    "/-/ready": OwnPage("/-/ready", f"{OWN_PREFIX}GetReadiness", needs_readiness=True),
    "/-/metrics": OwnPage("/-/metrics", f"{OWN_PREFIX}GetMetrics"),
    "/-/sign-in": OwnPage("/-/sign-in", stranger=True),
    "/-/signed-in": OwnPage("/-/signed-in", stranger=True, answers_provider=True),
    "/-/sign-out": OwnPage("/-/sign-out", stranger=True),
}
# Presigned links: the target's name follows.
LINKS = "/-/ui/"
_LINK = OwnPage(f"{LINKS}{{target}}", is_link=True)
_NONE = OwnPage("/-/unknown")


def own_page(path: str) -> OwnPage:
    """The page at a canonical path below `/-/`."""
    return _PAGES.get(path) or (_LINK if path.startswith(LINKS) else _NONE)
