"""By which name a request asks for the server: a page of the web that a browser shows has none of its own to use.

A page can send requests to its reader's own machine, and read the answers once its name leads there ("DNS rebinding").
"""

from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers

_OWN = ("localhost", "local", "internal")  # top-level domains that no stranger can have a name in (RFC 6761, RFC 6762)


def foreign_name(headers: Headers) -> str | None:
    """The name in Host, or that of the page in Origin, where it may be a stranger's; None where neither is.

    An address of this machine or its networks is not, nor a name without a dot, as Docker's services have.
    """
    hosts, origins = (headers.getlist(name) for name in ("Host", "Origin"))
    if "null" in origins:  # a page that hides where it is from
        return "null"
    pages = [origin for origin in origins if origin.startswith(("http://", "https://"))]
    for place in (*(f"//{host}" for host in hosts), *pages):
        try:
            name = (urlsplit(place).hostname or "").rstrip(".")
        except ValueError:
            return place
        if _is_foreign(name):
            return name
    return None


def _is_foreign(name: str) -> bool:
    try:
        return ip_address(name).is_global
    except ValueError:
        return "." in name and name.rpartition(".")[2] not in _OWN
