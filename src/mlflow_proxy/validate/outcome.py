"""What came of a step of `mlflow-proxy validate`; the likely cause of an unwelcome answer, and what to do."""

from __future__ import annotations

from typing import NamedTuple

from mlflow_proxy.validate.calls import Reply, Unanswered

# What the proxy's roles say at the end of a refusal, and AWS does not.
_ASK = "Ask the proxy's operator for a role"
_CHECK = "on the proxy's host, mlflow-proxy check tells more"


class Outcome(NamedTuple):
    """As in `check_table.Step`.

    `fatal`: the steps after this one have nothing to stand on. `unreachable`: nor is there anything that answers.
    """

    good: bool | None
    found: str
    advice: str = ""
    skipped: bool = False
    request_id: str = ""
    fatal: bool = False
    unreachable: bool = False


class Refused(Exception):
    """Ends a step with an outcome."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.found)
        self.outcome = outcome


def skipped(why: str) -> Outcome:
    """A step that was left out on purpose."""
    return Outcome(None, why, skipped=True)


def failed(reply: Reply, *, fatal: bool = False) -> Outcome:
    """An answer that is not what a step needs."""
    found, advice = _explained(reply)
    return Outcome(False, found, advice, request_id=reply.request_id, fatal=fatal)


def unanswered(failure: Unanswered, *, fatal: bool = False) -> Outcome:
    """No answer."""
    if failure.late:
        advice = "Something on the way drops packets, or the proxy hangs: look at security groups and at its log."
    elif "certificate" in failure.reason:
        advice = "Name the file of its CA with --ca."
    else:
        advice = "See whether the service runs, and what stands before it; run this again."
    return Outcome(False, failure.reason, advice, fatal=fatal)


def words(reply: Reply) -> str:
    """What an error in MLflow's shape says, without what the advice says again."""
    return (reply.message or reply.error_code).partition(_ASK)[0].rstrip(". ")


def is_role_refusal(reply: Reply) -> bool:
    """Whether the proxy's own roles said no, not AWS."""
    return reply.status == 403 and _ASK in reply.message


def is_down(reply: Reply) -> bool:
    """Whether there is no use in further calls for the same target."""
    return reply.status in (429, 501, 502, 503, 504)


def _explained(reply: Reply) -> tuple[str, str]:
    if reply.leads_to is not None:
        return (
            f"{reply.status}: redirected to {reply.leads_to}",
            "A load balancer's sign-in takes this call for a browser's. Let it leave alone what brings Authorization "
            "or is not for a browser, and let unauthenticated requests pass (OnUnauthenticatedRequest=allow). Or "
            "something else answers at this address.",
        )
    if reply.error_code:
        return f"{reply.status}: {words(reply)}", _advice(reply)
    return _stranger(reply)


def _advice(reply: Reply) -> str:  # noqa: PLR0911  (a table)
    """What to do about an error in MLflow's shape."""
    match reply.status:
        case 401:
            return (
                "Give a key in MLFLOW_PROXY_KEY or --key-file. If one was shown, it is wrong, expired or revoked, "
                "or the proxy knows no such way of identifying: its log line with this request id says which."
            )
        case 403 if is_role_refusal(reply):
            return "Use a key of a role that allows it, or add it to the role; a reader validates with --read-only."
        case 403:
            return f"The AWS identity that signs for this caller lacks the action, or its credentials; {_CHECK}."
        case 421:
            return "Set server.public_url to this address, or add its host to server.allowed_hosts."
        case 429:
            wait = reply.headers.get("retry-after", "")
            return f"Wait {f'{wait} s' if wait.isdigit() else 'a minute'}, and run this again; or raise the rate."
        case 501 | 502 | 503 | 504:
            return f"The proxy runs, but its target or its AWS credentials fail; {_CHECK}."
        case 500:
            return "The log of the proxy, or of MLflow, has the reason by this request id."
    return ""


def _stranger(reply: Reply) -> tuple[str, str]:
    """Something that does not answer in MLflow's shape."""
    kind = "a web page" if reply.is_html else "something that is not MLflow's JSON"
    found = f"{reply.status}, with {kind}"
    if reply.status in (502, 503, 504):
        return found, (
            "The load balancer or nginx answers in the proxy's place: it has no healthy host. Look at its target "
            "group, and at the service on the hosts."
        )
    if reply.status == 403:
        return found, "A web firewall or server in front refused the call; its log says by which rule."
    if reply.status == 400 and b"certificate" in reply.body.lower():
        return found, "A client certificate is asked for: --client-cert and --client-key."
    if reply.status == 400 and b"HTTPS port" in reply.body:
        return found, "This port speaks TLS: write https:// in --url."
    return found, "Something else than the proxy answers at this address. Compare it with the stack's output Url."
