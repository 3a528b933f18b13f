"""What all endpoints of one model share: the engine, the model's names, the numbers that are counted."""

import time

from internvl_rt.engine.async_engine import AsyncEngine
from internvl_rt.engine.engine import Engine
from internvl_rt.engine.reply import Reply, Timings
from internvl_rt.errors import InternVLError
from internvl_rt.inputs.channels import end_ids
from internvl_rt.inputs.sampling_params import SamplingParams
from internvl_rt.model.work import Roof
from internvl_rt.server.ask import Asking
from internvl_rt.server.call import Call
from internvl_rt.server.fault import ApiError
from internvl_rt.server.gate import Gate
from internvl_rt.server.keys import Keys
from internvl_rt.server.log import Log
from internvl_rt.server.metrics import Metrics
from internvl_rt.server.options import ServerOptions
from internvl_rt.server.protocol import encode
from internvl_rt.server.remote import Fetcher

TIMINGS_HEADER = "x-internvl-rt-timings"


class Service(Gate):
    """One model that is served. The endpoints are its callers; it knows none of them."""

    def __init__(
        self,
        core: Engine,
        engine: AsyncEngine,
        names: tuple[str, ...],
        options: ServerOptions,
        keys: Keys,
        log: Log,
        fetcher: Fetcher | None = None,
    ) -> None:
        """names: those of the model in requests; the first is the one in answers."""
        super().__init__(options, keys, log)
        self.core, self.engine, self.names, self.created = core, engine, names, int(time.time())
        fetcher = fetcher or Fetcher(options.remote_hosts, options.max_remote_bytes, options.remote_timeout_s)
        self.asking = Asking(options, core.config, fetcher, core.max_model_len)
        self.metrics = Metrics(names[0], lambda: {"alive": self.is_alive, **engine.stats()})

    @property
    def is_alive(self) -> bool:
        """Whether the engine takes requests, or would if the server did."""
        try:
            self.engine.check()
        except InternVLError:
            return False
        return True

    def failed(self, code: str) -> None:
        self.metrics.failed(code)

    def check_model(self, name: str | None) -> None:
        """Raises ApiError for the name of another model; a request without one means this one."""
        if name is not None and name not in self.names:
            what = f"the model {name!r:.100} is not served here; send {self.names[0]!r}"
            raise ApiError(404, what, "model_not_found", "model")

    def timeout_s(self, given: float | None) -> float:
        """Returns the most seconds of a request."""
        if given is not None and not 0 < given <= self.options.request_timeout_s:
            what = f"timeout_s: expected seconds above 0 and at most {self.options.request_timeout_s:g}, got {given:g}"
            raise ApiError(400, what, "limit_exceeded", "timeout_s")
        return given or self.options.request_timeout_s

    def end_ids(self, params: SamplingParams) -> frozenset[int]:
        """Returns the tokens that end an answer and are not part of its text."""
        own = end_ids(self.core.config, self.core.tokenizer)
        return frozenset((*(() if params.ignore_eos else own), *params.stop_ids))

    def answered(self, call: Call, reply: Reply, params: SamplingParams) -> None:
        """Counts a request that the engine has answered, and keeps its numbers for the log."""
        self.metrics.finished(reply, params, max(0.0, time.perf_counter() - call.start_s - reply.timings.total_s))
        call.facts |= {
            "prompt_tokens": reply.usage.prompt_tokens,
            "image_tokens": reply.usage.image_tokens,
            "cached_tokens": reply.usage.cached_tokens,
            "completion_tokens": reply.usage.completion_tokens,
            "finish": reply.finish_reason,
            **stages_of(reply.timings, None),
        }

    def timings(self, call: Call, reply: Reply) -> dict[str, object]:
        """Returns what the end of a stream says of the seconds of each stage, if the request wants that."""
        if not call.wants_timings:
            return {}
        return {"timings": {"floors": None, "roof": None} | stages_of(reply.timings, self.core.roof)}

    def timings_header(self, call: Call, reply: Reply) -> dict[str, str]:
        """Returns a header with the seconds of each stage, if the request wants it."""
        stages = self.timings(call, reply)
        return {TIMINGS_HEADER: encode(stages["timings"]).decode()} if stages else {}


def stages_of(timings: Timings, roof: Roof | None) -> dict[str, object]:
    """Returns the seconds of a request's stages. roof: adds the least that the device needs for each."""
    names = ("media_s", "tile_s", "queued_s", "vision_s", "prefill_s", "decode_s", "first_token_s", "total_s")
    stages: dict[str, object] = {name: round(getattr(timings, name), 6) for name in names}
    stages |= {"per_token_s": round(timings.per_token_s, 6), "num_decoded": timings.num_decoded}
    if roof is not None:
        works = ("vision", "prefill", "decode")
        floors = {f"{name}_s": round(roof.floor_s(getattr(timings, f"{name}_work")), 6) for name in works}
        stages |= {"floors": floors, "roof": roof.name}
    return stages
