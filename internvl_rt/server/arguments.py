"""The arguments of `internvl-rt serve`, made from the options of the server and of the engine."""

from internvl_rt.arguments import Parser, add_options
from internvl_rt.engine.options import ENGINE_KINDS, EngineOptions
from internvl_rt.server.options import SERVER_KINDS, ServerOptions


def build_parser(model_help: str) -> Parser:
    parser = Parser(
        prog="internvl-rt serve",
        usage="%(prog)s MODEL [options]",
        description="Serves a model over HTTP: OpenAI's interface at /v1, a page to try it at /, metrics at /metrics.",
    )
    parser.add_argument("model", metavar="MODEL", help=model_help)
    add_options(parser.add_argument_group("server"), ServerOptions, SERVER_KINDS)
    add_options(parser.add_argument_group("engine"), EngineOptions, ENGINE_KINDS)
    return parser
