"""sasa-demo: a local page that shows the classes of an image dropped on it, and where each of its pixels looks."""

import argparse
import os
import sys
from pathlib import Path

from sasa_train.commands import described, end_command, positive, run
from sasa_train.runs.source import check_source
from sasa_train.terminal import load_torch, printable, say, warn, with_command

HOST, PORT = "127.0.0.1", 7860
EPILOG = """Drop a picture on the page: it shows the most probable classes and, for each attention layer and head, where
the pixel that you click looks. The page needs nothing but this command: it works offline, and no picture leaves the
machine. Ctrl-C ends it.

examples:
  sasa-demo outputs/RUN_NAME
  sasa-demo outputs/RUN_NAME --port 8000 --open weights=raw trainer.device=cpu
  ssh -L 7860:127.0.0.1:7860 server                  shows the page of a command on a server in the browser at home

key=value: keys over the checkpoint's config; weights=raw: the model's own weights instead of their moving average.

Exit codes: 0 ended by Ctrl-C, 2 refused, 1 failed."""


def main() -> None:
    try:
        end_command(run_command)
    except SystemExit as end:
        # A thread that still computes an answer may abort the process while Python ends it.
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else 1)


def run_command(arguments: list[str]) -> int:
    """Run the command with the given arguments and return its exit code."""
    return run(build_parser(), arguments, serve)


def build_parser() -> argparse.ArgumentParser:
    usage = "sasa-demo RUN_OR_CHECKPOINT [options] [weights=ema|raw] [key=value ...]"
    parser = described(prog="sasa-demo", usage=usage, description=__doc__, epilog=EPILOG)
    parser.add_argument("checkpoint", metavar="RUN_OR_CHECKPOINT", type=Path, help="a run folder or a checkpoint file")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="keys over the checkpoint's config, weights=raw"
    )
    parser.add_argument("--port", metavar="N", type=port, default=PORT, help=f"0 takes any free one ({PORT})")
    parser.add_argument(
        "--host", metavar="ADDRESS", default=HOST, help=f"({HOST}: this machine only; 0.0.0.0 lets the network in)"
    )
    parser.add_argument("--top-k", metavar="K", type=positive, default=5, help="classes to show, the best first (5)")
    parser.add_argument(
        "--open", action=argparse.BooleanOptionalAction, default=False, help="open the page in a browser (--no-open)"
    )
    return parser


def port(text: str) -> int:
    """Convert an option's value to a port; raise argparse.ArgumentTypeError if it is not one."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number, at most 65535")
    return int(text)


def serve(options: argparse.Namespace) -> None:
    """Load the model and serve its page until Ctrl-C.

    Raises:
        CheckpointError: there is no readable checkpoint.
        ConfigError: an override, the host or the port is invalid, or the port is taken.
        WeightsError: the model is not finite.
    """
    from sasa_train.demo.server import listen

    check_source(options.checkpoint, options.overrides)
    with listen(options.host, options.port) as server:  # a port that is taken is refused at once
        load_torch()
        from sasa_train.demo.answers import Demo
        from sasa_train.trained import load_trained

        server.demo = Demo(load_trained(options.checkpoint, options.overrides), options.top_k)
        server.demo.warm_up()
        say(with_command(f"{printable(options.checkpoint)}: the page is", f"{server.url}  (Ctrl-C ends it)"))
        if options.open and not open_browser(server.url):
            warn(f"no browser could be opened; open {server.url} yourself")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            server.demo.finish()
            say("ended")


def open_browser(url: str) -> bool:
    import webbrowser

    return webbrowser.open(url)
