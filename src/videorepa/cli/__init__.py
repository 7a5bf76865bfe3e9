"""The command line: runs a verb and turns errors into messages and exit codes."""

from __future__ import annotations

import errno
import functools
import os
import sys
from collections.abc import Callable
from inspect import cleandoc
from pathlib import Path

import tyro

import videorepa
from videorepa.cli.clips import evaluate, generate, refine, report, select
from videorepa.cli.exchange import export, import_
from videorepa.cli.lab import demo, lab
from videorepa.cli.probing import likelihood, probe, scan
from videorepa.cli.training import compare, head, inspect, prepare, train, verify
from videorepa.errors import UserError, lacks_memory
from videorepa.system.files import from_home
from videorepa.system.stopping import Terminated, terminable

VERBS = {
    verb.__name__.removesuffix("_"): verb  # `import` cannot name a function.
    for verb in (
        *(prepare, head, train, refine, generate, evaluate, select, export, import_),
        *(inspect, verify, scan, probe, likelihood, compare, report, demo, lab),
    )
}

for _verb in VERBS.values():
    # tyro keeps the line breaks within an argument's text, whatever the terminal's width.
    _text, _args, _arguments = cleandoc(_verb.__doc__ or "").partition("\nArgs:\n")
    _verb.__doc__ = _text + _args + _arguments.replace("\n    ", " ")

STARTS_OVER = {
    *("head", "export", "import", "inspect", "verify", "compare", "report", "select"),
    *("lab text-encoder", "lab assemble", "lab ship", "lab laws"),
}
"""Verbs, and parts of `lab`, that lose their work when they are stopped. The others resume it."""


def main(arguments: list[str] | None = None) -> int:
    """Run a verb.

    Args:
      arguments: The verb and its arguments; by default those of the process.

    Returns:
      The exit code: 0 if all went well, 1 after an error that the user can mend, 130 after Ctrl-C,
      143 after SIGTERM, and 141 if the reader of the output has gone, as for a process that SIGPIPE
      ends.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    starts_over = not STARTS_OVER.isdisjoint({" ".join(arguments[:n]) for n in (1, 2)})
    try:
        with terminable():
            _run(arguments)
    except BrokenPipeError:
        # Python flushes once more when it exits, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        next_time = "starts over" if starts_over else "goes on from here"
        print(f"\nStopped. The same command {next_time}.", file=sys.stderr)
        return 143 if isinstance(interrupt, Terminated) else 130
    except OSError as error:
        if error.errno is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(
            f"error: {where}{error.strerror}. {_advice(error.errno, starts_over)}", file=sys.stderr
        )
        return 1
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        reason = str(error).partition("\n")[0][:200]
        print(
            f"error: There is not enough memory ({reason or type(error).__name__}). Take smaller "
            "batches, shorter or smaller clips; docs/running.md lists what saves memory.",
            file=sys.stderr,
        )
        return 1
    return 0


def _run(arguments: list[str]) -> None:
    """Run the verb that the arguments name, and flush its output."""
    if arguments in (["--version"], ["-V"]):
        print(videorepa.__version__, flush=True)
        return
    names_a_verb = bool(arguments) and arguments[0] in VERBS
    verbs = VERBS if names_a_verb else {name: _in_brief(verb) for name, verb in VERBS.items()}
    try:
        tyro.extras.subcommand_cli_from_dict(
            verbs,
            prog="videorepa",
            description=(videorepa.__doc__ or "").splitlines()[0],
            args=_with_overrides(arguments),
            registry=_REGISTRY,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.HelptextFromCommentsOff),
        )
    finally:
        sys.stdout.flush()


_REGISTRY = tyro.constructors.ConstructorRegistry()


@_REGISTRY.primitive_rule
def _path_rule(
    type_info: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec[Path] | None:
    """Read a path with `~` in it: shells leave it in `--out=~/runs`."""
    if type_info.type is not Path:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda texts: from_home(Path(texts[0])),
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda path: [str(path)],
    )


def _in_brief(verb: Callable[..., None]) -> Callable[..., None]:
    """Give the verb only the first sentence of its help, for the list of all verbs."""

    @functools.wraps(verb)
    def brief(**arguments: object) -> None:
        verb(**arguments)

    brief.__doc__ = (verb.__doc__ or "").partition("\n")[0]
    return brief


def _with_overrides(arguments: list[str]) -> list[str]:
    """Write options with a dot, which are keys of the recipe, as `--set key=value`."""
    plain: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        name, equals, value = argument.partition("=")
        if name.startswith("--") and "." in name:
            value = value if equals else next(remaining, None)
            if value is None or (not equals and value.startswith("--")):
                raise UserError(f"{name} needs a value: {name} VALUE, or {name}=VALUE.")
            plain += ["--set", f"{name[2:].replace('-', '_')}={value}"]
        else:
            plain.append(argument)
    return plain


def _advice(number: int, starts_over: bool) -> str:
    """Say what to do about an error of the operating system."""
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        next_time = "starts over" if starts_over else "goes on where it stopped"
        return f"Make room and run the same command again; it {next_time}."
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "Check who owns it and who may read and write it, or choose another place."
    return "Check the path, or choose another."
