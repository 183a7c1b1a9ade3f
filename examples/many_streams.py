"""Many live streams at once on one event loop: each keeps a state of its own on the server.

Run: python examples/many_streams.py [TARGET]
"""

import asyncio
import sys

from rnnserve import AsyncClient, Sample

TARGET = sys.argv[1] if len(sys.argv) > 1 else "localhost:50051"
MODEL = "speaker"


async def listen(client: AsyncClient, sample: Sample) -> bool:
    """Streams one recording; whether the answer after its last frame is right."""
    label = None
    async with client.stream(MODEL) as stream:
        async for answer in stream.steps(sample.input):
            label = answer.label
    print(f"{sample.name}: {label}, truly {sample.label}")
    return label == sample.label


async def main() -> None:
    """One task for each recording."""
    async with AsyncClient(TARGET) as client:
        samples = await client.samples(MODEL)
        right = await asyncio.gather(*(listen(client, sample) for sample in samples))
        print(f"{sum(right)} of {len(right)} right")


asyncio.run(main())
