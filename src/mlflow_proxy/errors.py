"""Answers of the proxy's own to a request that it cannot serve, in the JSON shape that MLflow clients understand.

`{"error_code": …, "message": …, "request_id": …}`: the error codes are MLflow's, so that a client raises the same
exception it would raise for MLflow's own answer; the message is for the person who reads it.

MLflow's clients (2.8 to 3.17) repeat 408, 429, 500, 502, 503 and 504 for half a minute and then hide the message. So
those are for what passes by itself; what waits for the operator is 501, which clients show at once, as curl and Go's
retryablehttp do, and which alarms and load balancers still count as the server's fault, unlike any 4xx.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from http import HTTPStatus

Headers = list[tuple[bytes, bytes]]

# In answers of the proxy's own: no browser guesses another type, nor shows it in a frame.
NO_SNIFFING = (b"x-content-type-options", b"nosniff")
NO_FRAMES = (b"x-frame-options", b"DENY")
# The status and error code of what only the operator can mend.
NEEDS_OPERATOR = 501
NEEDS_OPERATOR_CODE = "INVALID_STATE"

# HTTP status → error code of MLflow's protocol (mlflow.protos.databricks_pb2.ErrorCode).
_CODES = {
    400: "BAD_REQUEST",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    405: "BAD_REQUEST",
    408: "BAD_REQUEST",
    413: "BAD_REQUEST",
    414: "BAD_REQUEST",
    421: "BAD_REQUEST",
    429: "REQUEST_LIMIT_EXCEEDED",
    431: "BAD_REQUEST",
    500: "INTERNAL_ERROR",
    501: "NOT_IMPLEMENTED",
    502: "TEMPORARILY_UNAVAILABLE",
    503: "TEMPORARILY_UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}


class Refusal(Exception):
    """Ends a request with `status`. `message` says what is wrong and what to do; it is shown to the caller.

    So it is made of our own words and the caller's; whatever else is known (IAM principals, ARNs, addresses, texts of
    AWS or of exceptions) belongs in `detail`, which goes into the log only. `in_log`: only the operator can act on it,
    so the caller is told under which request id the log has the detail. `retry_after` is in seconds. `close` ends the
    connection, since an unread body would follow. `limit` names the limit that refused, if one did.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        error_code: str | None = None,
        retry_after: int | None = None,
        headers: Iterable[tuple[str, str]] = (),
        close: bool = False,
        detail: str | None = None,
        in_log: bool = False,
        limit: str = "",
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.error_code = error_code or _CODES.get(status, HTTPStatus(status).name)
        self.retry_after = retry_after
        self.headers = tuple(headers)
        self.close = close
        self.detail = detail
        self.in_log = in_log
        self.limit = limit

    @property
    def reason(self) -> str:
        """What the operator reads."""
        return self.detail or self.message

    def again(self) -> Refusal:
        """A new one that says the same: raised twice, one object would gather the tracebacks of all its requests."""
        return Refusal(
            self.status,
            self.message,
            error_code=self.error_code,
            retry_after=self.retry_after,
            headers=self.headers,
            close=self.close,
            detail=self.detail,
            in_log=self.in_log,
            limit=self.limit,
        )

    def said(self, request_id: str) -> str:
        """What the caller reads."""
        if self.in_log:  # in the message, since MLflow's clients show nothing else of the body
            where = f"The proxy's operator finds the reason in its log, under the request id {request_id}."
            return f"{self.message} {where}"
        return self.message

    def answer(self, request_id: str) -> tuple[int, Headers, bytes]:
        """Status, headers and body to send."""
        body = error_body(self.error_code, self.said(request_id), request_id)
        headers: Headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"cache-control", b"no-store"),
            (b"x-request-id", request_id.encode("ascii")),
        ]
        if self.retry_after is not None:
            headers.append((b"retry-after", b"%d" % self.retry_after))
        headers += [(name.encode("ascii"), value.encode("latin-1")) for name, value in self.headers]
        return self.status, headers, body


def error_body(error_code: str, message: str, request_id: str) -> bytes:
    """The JSON body of an error."""
    content = {"error_code": error_code, "message": message, "request_id": request_id}
    return json.dumps(content, ensure_ascii=False).encode("utf-8", "replace")
