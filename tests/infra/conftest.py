"""Before CDK's library starts Node.js, `infra` says which; so it is imported first."""

import infra  # noqa: F401
