"""Step 3 of a request's way: which target a path is for, and which path that target gets.

`/…` is the default target's, `/t/<name>/…` a named one's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple

from mlflow_proxy.errors import Refusal
from mlflow_proxy.targets import Target

PREFIX = "/t/"
OWN_PREFIX = "/-/"


# Gives the names of the targets that the caller may know of; called only where they are told.
Visible = Callable[[], Collection[str]]


class Route(NamedTuple):
    """Where a request goes. `prefix` is what stands before `path` on the proxy: `/t/<name>`, or nothing."""

    target: Target
    prefix: str
    path: str


class Routes:
    """The targets of one configuration, by name. `prefix` is what callers see before the paths of the proxy."""

    def __init__(self, targets: Iterable[Target], prefix: str = "") -> None:
        self._shown = f"{prefix}{PREFIX}"
        self._named = {target.name: target for target in targets}
        self._default = next((target for target in self._named.values() if target.default), None)

    def find(self, path: str, query: str, visible: Visible) -> Route:
        """The route of a canonical path. Raises Refusal: 404 for an unknown target, 308 for `/t/<name>` itself."""
        if not path.startswith(PREFIX):
            if path == "/t":
                raise self.unknown("", visible)
            if self._default is None:
                raise Refusal(404, f"There is no default target.{self._choices(visible)}", detail="no default target")
            return Route(self._default, "", path)
        name, slash, rest = path[len(PREFIX) :].partition("/")
        target = self._named.get(name)
        if target is None:
            raise self.unknown(name, visible)
        if not slash:  # MLflow's UI refers to its files relatively, so it needs the slash
            # Relative, as all locations: a server in front may have taken a prefix off the path.
            location = f"{name}/" + (f"?{query}" if query else "")
            raise Refusal(308, f"Use {self._shown}{name}/.", error_code="REDIRECT", headers=[("location", location)])
        return Route(target, PREFIX + name, f"/{rest}")

    def unknown(self, name: str, visible: Visible) -> Refusal:
        """The answer to a name that is no target's, with those that the caller may know of."""
        return Refusal(404, f"There is no target {name!r}.{self._choices(visible)}", detail="no such target")

    def by_name(self, name: str, visible: Visible) -> Target:
        """A target by its name. Raises Refusal 404."""
        target = self._named.get(name)
        if target is None:
            raise self.unknown(name, visible)
        return target

    def is_default(self, name: str) -> bool:
        """Whether requests without `/t/<name>` go to this one."""
        return self._default is not None and self._default.name == name

    def _choices(self, visible: Visible) -> str:
        names = visible()
        known = " or ".join(f"{self._shown}{name}/" for name in self._named if name in names)
        return f" Use {known}." if known else ""
