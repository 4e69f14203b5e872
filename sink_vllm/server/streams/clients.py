"""Which client a request for stored streams comes from: by its key or its address.

What a server remembers is shared out among clients (``streams.shares``). An API key is a client
wherever the server checks keys. Where it does not, anybody could make up a key for each stream, so
the address of the connection is what counts; of an IPv6 address the first 64 bits, as one machine
has all the rest. Imports neither torch nor vLLM.
"""

import hashlib
import ipaddress

_SITE_BITS = 64
KEY_CLIENT = "key "
"""What the names of clients with a key of their own begin with."""


def client_name(authorization: str | None, host: str | None, *, keys_checked: bool) -> str:
    """The client of a request.

    Args:
        authorization: its header of that name, which the server has let pass.
        host: address of the peer; ``None`` if it has none (a Unix socket).
        keys_checked: whether the server was started with API keys.
    """
    if keys_checked and authorization:
        key = authorization.partition(" ")[2]
        return f"{KEY_CLIENT}{hashlib.sha256(key.encode()).hexdigest()}"
    return f"address {_site(host)}"


def _site(host: str | None) -> str:
    try:
        address = ipaddress.ip_address((host or "").partition("%")[0])
    except ValueError:
        return host or "local"
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.IPv6Network((address, _SITE_BITS), strict=False))
