"""Step 2 of a request's way: which target a path is for, and which path that target gets.

`/…` is the default target's, `/t/<name>/…` a named one's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from mlflow_proxy.errors import Refusal
from mlflow_proxy.targets import Target

PREFIX = "/t/"
OWN_PREFIX = "/-/"


class Route(NamedTuple):
    """Where a request goes. `prefix` is what stands before `path` on the proxy: `/t/<name>`, or nothing."""

    target: Target
    prefix: str
    path: str


class Routes:
    """The targets of one configuration, by name."""

    def __init__(self, targets: Iterable[Target]) -> None:
        self._named = {target.name: target for target in targets}
        self._default = next((target for target in self._named.values() if target.default), None)

    def find(self, path: str, query: str) -> Route:
        """The route of a canonical path. Raises Refusal: 404 for an unknown target, 308 for `/t/<name>` itself."""
        if not path.startswith(PREFIX):
            if path == "/t":
                raise self.unknown("")
            if self._default is None:
                raise Refusal(404, f"There is no default target. Use {self._choices()}.")
            return Route(self._default, "", path)
        name, slash, rest = path[len(PREFIX) :].partition("/")
        target = self._named.get(name)
        if target is None:
            raise self.unknown(name)
        if not slash:  # MLflow's UI refers to its files relatively, so it needs the slash
            location = f"{PREFIX}{name}/" + (f"?{query}" if query else "")
            raise Refusal(308, f"Use {PREFIX}{name}/.", error_code="REDIRECT", headers=[("location", location)])
        return Route(target, PREFIX + name, f"/{rest}")

    def unknown(self, name: str) -> Refusal:
        """The answer to a name that is no target's. Whoever may call may see the names, as long as all may call."""
        return Refusal(404, f"There is no target {name!r}. Use {self._choices()}.")

    def by_name(self, name: str) -> Target:
        """A target by its name. Raises Refusal 404."""
        target = self._named.get(name)
        if target is None:
            raise self.unknown(name)
        return target

    def _choices(self) -> str:
        return " or ".join(f"{PREFIX}{name}/" for name in self._named)
