"""Handle errors: each reason is an exception of its own, and a refused step changes nothing.

Run: python examples/handle_errors.py [TARGET]
"""

import sys
import time

from rnnserve import Client, ModelNotStreamable, NotFinite, RnnserveError, TryAgain

TARGET = sys.argv[1] if len(sys.argv) > 1 else "localhost:50051"
FRAME = [0.1] * 12
BAD_FRAME = [0.1] * 11 + [float("inf")]

with Client(TARGET) as client:
    # A network that reads from both ends cannot stream.
    try:
        with client.stream("speaker-bidirectional"):
            pass
    except ModelNotStreamable as error:
        print(f"{error.reason}: {error}")

    # A refused step leaves the stream as it was: send it again, corrected.
    with client.stream("speaker") as stream:
        try:
            answer = stream.step(BAD_FRAME)
        except NotFinite as error:
            print(f"{error.field}: {error}")
            answer = stream.step(FRAME)
        print(f"step {answer.step}: {answer.label}")

    # A busy server says when to come back.
    try:
        print(client.predict("speaker", [[FRAME]])[0].label)
    except TryAgain as error:
        time.sleep(error.retry_after_s or 1.0)

    # In bulk, a bad sequence need not stop the others.
    for result in client.predict_many("speaker", [[BAD_FRAME], [FRAME]], errors="return"):
        print(f"{result.reason} at {result.index}" if isinstance(result, RnnserveError) else result.label)
