"""`internvl-rt serve MODEL`: checks all that was given, loads the engine, and serves until it is told to stop."""

import sys
from contextlib import nullcontext
from pathlib import Path

from internvl_rt.arguments import options_of
from internvl_rt.engine.async_engine import AsyncEngine
from internvl_rt.engine.engine import Engine
from internvl_rt.engine.host_memory import keep_large_buffers
from internvl_rt.engine.options import ENGINE_KINDS, EngineOptions
from internvl_rt.server.app import build_app
from internvl_rt.server.arguments import build_parser
from internvl_rt.server.keys import read_keys
from internvl_rt.server.life import Server, bind, end_at_sigterm
from internvl_rt.server.log import Log
from internvl_rt.server.options import SERVER_KINDS, ServerOptions
from internvl_rt.server.service import Service

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(arguments: list[str], model_help: str) -> int:
    """Takes the arguments after `serve`; returns the exit code. Everything is checked before a model is loaded."""
    args = build_parser(model_help).parse_args(arguments)
    options = ServerOptions(**options_of(args, SERVER_KINDS))
    engine_options = options_of(args, ENGINE_KINDS)
    EngineOptions(**engine_options)
    keys, log = read_keys(options.api_keys_file), Log(sys.stderr)
    if options.host not in LOOPBACK and not keys:
        log.write("open to others", level="warning", host=options.host, remedy="give --api-keys-file")
    with bind(options.host, options.port) as bound:
        end_at_sigterm()
        keep_large_buffers()
        core = Engine.from_pretrained(args.model, **engine_options)
        names = options.served_model_name or (Path(args.model).name or args.model, args.model)
        service = Service(core, AsyncEngine(core), tuple(dict.fromkeys(names)), options, keys, log)
        server = Server(build_app(service), service, bound)
        with nullcontext() if options.trace is None else core.trace(options.trace):
            return server.serve_until_stopped()
