"""AWS's names of errors, by what can be done about them. STS says some differently from SageMaker; here are both.

Sources: the common errors of the STS and SageMaker API references, and of Signature Version 4.
"""

from __future__ import annotations

# The credentials' time is over.
EXPIRED = frozenset({"ExpiredToken", "ExpiredTokenException", "RequestExpired"})
# The access key was deleted or turned off.
UNKNOWN_KEY = frozenset({"UnrecognizedClientException", "InvalidClientTokenId"})
# The secret key does not belong to the access key, or the clock is wrong.
BAD_SIGNATURE = frozenset({"InvalidSignatureException", "SignatureDoesNotMatch"})
# What credentials from the same source, fetched anew, cure.
STALE = EXPIRED | UNKNOWN_KEY
DENIED = frozenset({"AccessDenied", "AccessDeniedException", "UnauthorizedOperation"})
# With these, "not now" is all that was said.
THROTTLED = frozenset({"ThrottlingException", "Throttling", "TooManyRequestsException", "RequestLimitExceeded"})
# Of STS's 4xx answers, those that another attempt may cure: the credential source may have newer ones by then.
PASSING = THROTTLED | EXPIRED | {"IDPCommunicationError", "RequestTimeout", "RequestTimeoutException"}
