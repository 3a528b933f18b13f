"""Gets JSON out of a picture; the answer keeps to a schema. It needs the extra internvl-rt[grammar].

python examples/json_from_picture.py
python examples/json_from_picture.py OpenGVLab/InternVL3-1B page.png "Who sent the letter?" "$(cat schema.json)"
"""

import json
import sys
from importlib.resources import files

from internvl_rt import Engine, InternVLError, SamplingParams

SAMPLE = str(files("internvl_rt") / "tiny/samples/862053.png")
SCHEMA = """{
    "type": "object",
    "properties": {"number": {"type": "string", "pattern": "^[0-9]{6}$"}},
    "required": ["number"],
    "additionalProperties": false
}"""


def main(model: str = "tiny", picture: str = SAMPLE, question: str = "Read the digits.", schema: str = SCHEMA) -> None:
    engine = Engine.from_pretrained(model)
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    params = SamplingParams(max_tokens=512, json_schema=schema)
    reply = engine.chat([{"role": "user", "content": content}], params)
    if reply.finish_reason != "stop":
        sys.exit(f"the answer is not whole: {reply.text}")
    print(json.dumps(json.loads(reply.text), indent=2))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except InternVLError as error:
        sys.exit(str(error))
