"""Exit with 0 where the server in this container is ready for requests, else with 1 and the reason on stderr.

Standard library only. It asks the address that the server itself was told to listen on. `http.client` knows no
proxies, so HTTP_PROXY in the environment cannot send the question elsewhere.
"""

import http.client
import os
import sys

TIMEOUT_SECONDS = 4  # below the 5 s that a container engine gives the whole check
ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def main() -> None:
    """Ask /health/ready once."""
    host = os.environ.get("TITANS_HOST", "127.0.0.1")
    port = int(os.environ.get("TITANS_PORT", "8000"))
    connection = http.client.HTTPConnection(ANY_ADDRESS.get(host, host), port, timeout=TIMEOUT_SECONDS)
    try:
        connection.request("GET", "/health/ready")
        response = connection.getresponse()
        if response.status != 200:
            sys.exit(f"not ready: {response.status} {response.read(1000)!r}")
    except (OSError, http.client.HTTPException) as error:
        sys.exit(f"no answer: {error!r}")
    finally:
        connection.close()


if __name__ == "__main__":
    main()
