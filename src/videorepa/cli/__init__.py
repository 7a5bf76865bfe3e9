"""The command line: every verb with its arguments, examples and plain errors."""

from __future__ import annotations

import errno
import functools
import os
import sys
from collections.abc import Callable

import tyro

from videorepa.cli.clips import evaluate, generate, refine, report
from videorepa.cli.exchange import export, import_
from videorepa.cli.lab import demo, lab
from videorepa.cli.probing import probe, scan
from videorepa.cli.training import compare, head, inspect, prepare, train
from videorepa.errors import UserError

VERBS = {
    verb.__name__.removesuffix("_"): verb  # `import` cannot name a function.
    for verb in (
        *(prepare, head, train, refine, generate, evaluate, export, import_),
        *(inspect, scan, probe, compare, report, demo, lab),
    )
}


def main(arguments: list[str] | None = None) -> int:
    """Run a verb.

    The exit code is 0 if all went well, 1 for an error that the user can mend, 130 after Ctrl-C,
    and 141 where the reader of the output has gone, as of a process that SIGPIPE ended.
    """
    given = sys.argv[1:] if arguments is None else arguments
    if given in (["--version"], ["-V"]):
        from videorepa import __version__

        print(__version__)
        return 0
    try:
        _run(given)
    except BrokenPipeError:
        # Python flushes once more at its end, and would complain then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on from here.", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror}. {_advice(error.errno)}", file=sys.stderr)
        return 1
    return 0


def _run(arguments: list[str]) -> None:
    """Run the verb that the arguments name, and hand all of its output over."""
    names_a_verb = bool(arguments) and arguments[0] in VERBS
    verbs = VERBS if names_a_verb else {name: _in_brief(verb) for name, verb in VERBS.items()}
    try:
        tyro.extras.subcommand_cli_from_dict(
            verbs,
            prog="videorepa",
            description=(__import__("videorepa").__doc__ or "").splitlines()[0],
            args=_with_overrides(arguments),
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.HelptextFromCommentsOff),
        )
    finally:
        sys.stdout.flush()


def _in_brief(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb with the first sentence of its help alone, for the list of all verbs."""

    @functools.wraps(verb)
    def brief(**arguments: object) -> None:
        verb(**arguments)

    brief.__doc__ = (verb.__doc__ or "").partition("\n")[0]
    return brief


def _with_overrides(arguments: list[str]) -> list[str]:
    """Dotted options, which are keys of the recipe, spelled as `--set key=value`."""
    spelled: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        name, equals, value = argument.partition("=")
        if name.startswith("--") and "." in name:
            value = value if equals else next(waiting, None)
            if value is None or (not equals and value.startswith("--")):
                raise UserError(f"{name} wants a value: {name} VALUE, or {name}=VALUE.")
            spelled += ["--set", f"{name[2:].replace('-', '_')}={value}"]
        else:
            spelled.append(argument)
    return spelled


def _advice(number: int) -> str:
    """What to do about an error of the operating system."""
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "Make room and run the same command again; it goes on where it stopped."
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "Check who owns it and who may read and write it, or choose another place."
    return "Check the path, or choose another."
