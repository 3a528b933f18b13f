"""`python -m internvl_rt` is `internvl-rt`: the program from its first import to its exit."""

import signal
import sys
import warnings

from internvl_rt.terminal import importing


def main() -> int:
    if not sys.warnoptions:  # what libraries tell developers; `python -W default -m internvl_rt` shows it
        warnings.simplefilter("ignore")
    try:
        with importing():
            from internvl_rt.cli import main as run
        return run()
    finally:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while Python ends has nothing left to stop


if __name__ == "__main__":
    sys.exit(main())
