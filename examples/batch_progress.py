"""Asks one question about many pictures in one continuous batch; each answer is a line of JSON as soon as it is there.

python examples/batch_progress.py
python examples/batch_progress.py OpenGVLab/InternVL3-1B "What is the total?" scans/*.png > totals.jsonl
"""

import asyncio
import json
import sys
from importlib.resources import files

from tqdm.asyncio import tqdm

from internvl_rt import AsyncEngine, InternVLError, MediaError, RequestError, SamplingParams

SAMPLES = [str(path) for path in (files("internvl_rt") / "tiny/samples").iterdir()]


async def main(model: str = "tiny", question: str = "Read the digits.", *pictures: str) -> None:
    async def ask(picture: str) -> dict[str, str]:
        content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
        try:
            async with room:
                reply = await engine.chat([{"role": "user", "content": content}], SamplingParams(max_tokens=256))
        except (MediaError, RequestError) as error:
            return {"picture": picture, "error": str(error)}
        return {"picture": picture, "text": reply.text}

    room = asyncio.Semaphore(256)  # the engine refuses more than max_num_seqs + max_waiting requests at once
    async with AsyncEngine.from_pretrained(model) as engine:
        for answer in tqdm.as_completed([ask(picture) for picture in pictures or SAMPLES]):
            print(json.dumps(await answer), flush=True)


if __name__ == "__main__":
    try:
        asyncio.run(main(*sys.argv[1:]))
    except InternVLError as error:
        sys.exit(str(error))
