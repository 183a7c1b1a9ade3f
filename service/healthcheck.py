"""`python -m service.healthcheck`: exit code 0 while the server of this container serves.

It asks as any client would, with ours.
"""

import os
import sys

from rnnserve import Client, RetryPolicy, RnnserveError

TIMEOUT_S = 3.0


def main() -> bool:
    """Whether it serves."""
    target = f"127.0.0.1:{os.environ.get('RNNSERVE_PORT', '50051')}"
    with Client(target, timeout_s=TIMEOUT_S, retry=RetryPolicy(attempts=1)) as client:
        try:
            status = client.health()
        except RnnserveError as error:
            status = error.code
    if status != "serving":
        print(status, file=sys.stderr)
    return status == "serving"


if __name__ == "__main__":
    sys.exit(not main())
