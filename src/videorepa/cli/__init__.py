"""The command line: every verb with its arguments, examples and plain errors."""

from __future__ import annotations

import errno
import sys

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
    """Run a verb; the exit code is 0 if all went well, 1 for an error that the user can mend."""
    given = sys.argv[1:] if arguments is None else arguments
    if given in (["--version"], ["-V"]):
        from videorepa import __version__

        print(__version__)
        return 0
    try:
        tyro.extras.subcommand_cli_from_dict(
            VERBS,
            prog="videorepa",
            description=(__import__("videorepa").__doc__ or "").splitlines()[0],
            args=_with_overrides(given),
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.HelptextFromCommentsOff),
        )
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


if __name__ == "__main__":
    sys.exit(main())
