"""Evaluates a model in VLMEvalKit, which needs no change for it.

    python -m internvl_rt.harness.vlmevalkit OpenGVLab/InternVL3-1B --max-tiles 12 --data MMBench_DEV_EN --reuse

The arguments are a model, options of the engine as for `internvl-rt serve`, and any others of VLMEvalKit's run.py.
VLMEvalKit asks models behind an interface from `--api-nproc` threads at once, and keeps each answer; a model here says
that it is one, so that the threads share a continuous batch, and a run that was killed goes on with `--reuse`.
"""

import importlib.util
import logging
import runpy
import sys
from collections.abc import Mapping
from collections.abc import Sequence as Items
from functools import partial
from pathlib import Path
from typing import Any

from vlmeval.config import supported_VLM
from vlmeval.dataset import DATASET_MODALITY
from vlmeval.vlm.base import BaseModel

from internvl_rt.arguments import Parser, add_options, options_of
from internvl_rt.engine.engine import Engine
from internvl_rt.engine.options import ENGINE_KINDS, EngineOptions
from internvl_rt.errors import ContextLengthError, InternVLError, MediaError, RequestError
from internvl_rt.inputs.sampling_params import SamplingParams

FAILED = "Failed to obtain answer via API."  # by these words VLMEvalKit knows what to ask again
log = logging.getLogger("internvl_rt")


class Model(BaseModel):  # type: ignore[misc]  # VLMEvalKit ships no types
    """A model for VLMEvalKit. Any number of threads may call `generate` and `chat`.

    model: a folder, a hub id, or "tiny".
    max_new_tokens: most tokens of an answer.
    options: any of `internvl_rt.EngineOptions`.
    """

    is_api = True
    INTERLEAVE = True

    def __init__(self, model: str, *, max_new_tokens: int = 4096, **options: Any) -> None:
        super().__init__()
        self._params = SamplingParams(max_tokens=max_new_tokens)
        self.engine = Engine.from_pretrained(model, **options)

    def generate_inner(self, message: Items[Mapping[str, str]], dataset: str | None = None) -> str:
        """Answers a message of texts, pictures and videos."""
        return self.chat_inner([{"role": "user", "content": message}], dataset)

    def chat_inner(self, message: Items[Mapping[str, Any]], dataset: str | None = None) -> str:
        """Answers a conversation.

        A question that cannot be asked, because of a broken picture or a lack of room, gets VLMEvalKit's text of a
        failure: an error would end the run, and the answers of all waiting threads would be lost.
        """
        # VLMEvalKit gives the frames of a video as pictures, and a frame is one tile.
        limit = {"max_tiles": 1} if dataset is not None and DATASET_MODALITY(dataset) == "VIDEO" else {}

        def part(item: Mapping[str, str]) -> dict[str, Any]:
            kind, value = item["type"], item["value"]
            return {"type": kind, kind: value, **(limit if kind == "image" else {})}

        messages = [{"role": turn["role"], "content": [part(item) for item in turn["content"]]} for turn in message]
        try:
            return self.engine.chat(messages, self._params).text
        except (MediaError, ContextLengthError) as error:
            log.warning("no answer to a question of %s: %s", dataset, error)
            return f"{FAILED} {error}"


def main() -> None:
    parser = Parser(
        prog="python -m internvl_rt.harness.vlmevalkit",
        usage="%(prog)s MODEL [options] --data DATASET ... [arguments of VLMEvalKit's run.py]",
        description="Evaluates a model in VLMEvalKit. Arguments that are not listed here are those of its run.py.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help='a folder, a hub id, or "tiny"')
    add_options(parser.add_argument_group("engine"), EngineOptions, ENGINE_KINDS)
    args, others = parser.parse_known_args()
    name = Path(args.model).name  # of files
    supported_VLM[name] = partial(Model, args.model, **options_of(args, ENGINE_KINDS))
    sys.argv = ["run.py", "--model", name, *others]
    if importlib.util.find_spec("vlmeval.run"):
        runpy.run_module("vlmeval.run", run_name="__main__")
    else:
        runpy.run_path(str(_script()), run_name="__main__")


def _script() -> Path:
    """Returns the run.py of the clone that VLMEvalKit is installed from."""
    package = importlib.util.find_spec("vlmeval")
    script = Path((package and package.origin) or "").parents[1] / "run.py"
    if not script.is_file():
        raise RequestError(f"{script} is missing; install VLMEvalKit from a clone: pip install -e VLMEvalKit")
    return script


if __name__ == "__main__":
    try:
        main()
    except InternVLError as error:
        sys.exit(str(error))
