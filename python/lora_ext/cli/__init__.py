"""The ``lora-ext`` command.

Every module of this package whose name has no leading underscore is a subcommand: ``SUMMARY`` is
its line in the help, ``add_arguments(parser)`` declares its options, and ``run(args)`` does the
work and returns the exit status. Imports of more than the standard library belong inside ``run``,
so that the help is fast and a missing package disables only the subcommands that need it.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Sequence
from typing import cast

from ._command import EXIT_INTERRUPTED, EXIT_USAGE, Command, CommandError


def commands() -> dict[str, Command]:
    """Return the subcommands by the name the user types."""
    names = sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
    return {
        name.replace("_", "-"): cast("Command", importlib.import_module(f"{__name__}.{name}"))
        for name in names
    }


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lora-ext", description="Many LoRA adapters in one batch. Start with: lora-ext demo"
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in commands().items():
        subparser = subparsers.add_parser(name, help=command.SUMMARY, description=command.SUMMARY)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns its exit status (2: an input was wrong and nothing was done)."""
    args = make_parser().parse_args(argv)
    try:
        return int(args.run(args))
    except CommandError as error:
        for line in str(error).splitlines():
            print(f"lora-ext {args.command}: {line}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print(f"lora-ext {args.command}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
