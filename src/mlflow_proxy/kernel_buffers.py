"""What is sent waits in this process, where it is bounded and counted, not in the kernel, which would keep megabytes.

A service's memory limit counts the kernel's part, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket

# Bytes that are not on their way yet; more would make nothing faster, as what is on its way does not count.
_MOST_UNSENT = 128 * 1024


def keep_small(transport: asyncio.BaseTransport) -> None:
    """Bound the kernel's part of what one TCP connection sends."""
    sock = transport.get_extra_info("socket")
    if sock is not None:
        with contextlib.suppress(OSError):  # not every system can
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _MOST_UNSENT)
