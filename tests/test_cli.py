"""The command line as a shell sees it: its help, and what happens when nobody reads on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from importlib import import_module
from pathlib import Path

import pytest

from videorepa.cli import VERBS, main
from videorepa.settings import plugins
from videorepa.system.stopping import Terminated, postponed, terminable

COMMAND = [sys.executable, "-m", "videorepa"]


def test_the_help_has_a_line_for_each_verb(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    listed = [line.partition("•")[2].split()[0] for line in text.splitlines() if "•" in line]
    assert listed == list(VERBS)
    for verb in VERBS.values():
        first, _, rest = (verb.__doc__ or "").partition("\n")
        assert first in " ".join(text.split())
        assert not any(line.strip() in text for line in rest.splitlines() if len(line) > 40)


@pytest.mark.parametrize("verb", VERBS)
def test_each_option_has_a_text_that_only_the_width_breaks(verb, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    entries: list[list[str]] = []
    listed = re.split(r"\n.{1,3}options ", capsys.readouterr().out)[1]
    for line in listed.replace("│", " ").splitlines():
        if re.match(r"  \S", line):
            entries.append([])
        if line.startswith("  ") and entries:
            # The text is beside the name, or below a long one.
            entries[-1] += [part for part in re.split(" {2,}", line.strip()) if part]
    assert len(entries) > 1
    for name, *text in entries:
        assert len(text) == 1 and not text[0].startswith("(default"), f"{name}: {text}"


def test_help_loads_no_heavy_library() -> None:
    code = (
        "import sys; from videorepa.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'diffusers', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["report", "~/run"]) == 1
    assert f"{tmp_path / 'run'} is not a run: it does not exist" in capsys.readouterr().err
    monkeypatch.setattr(import_module("videorepa.report"), "report", lambda runs, out, **_: out)
    assert main(["report", "run", "--out=~/page.html"]) == 0
    assert f"report: {tmp_path / 'page.html'}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [["--version"], ["--help"], ["train", "--help"], ["inspect", "recipes/videorepa-2b.yaml"]],
)
def test_a_reader_that_goes_away_is_no_error(arguments: list[str]) -> None:
    verb = subprocess.Popen(
        [*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert verb.stdout is not None and verb.stderr is not None
    verb.stdout.close()
    said = verb.stderr.read()
    verb.stderr.close()
    assert (verb.wait(), said) == (141, "")


@pytest.mark.parametrize(
    ("arguments", "verb", "next_time"),
    [
        (["prepare", "recipes/videorepa-2b.yaml"], "prepare", "goes on from here"),
        (
            ["head", "recipes/videorepa-2b.yaml", "--kind", "motion", "--out", "h.safetensors"],
            "head.train_head",
            "starts over",
        ),
        (["export", "run", "out"], "export", "starts over"),
        (["lab", "laws", "laws.yaml"], "lab.models.make.make", "starts over"),
        (["lab", "teacher", "teacher.yaml"], "lab.models.make.make", "goes on from here"),
    ],
)
def test_stopped_a_verb_says_truly_what_the_same_command_does(
    arguments: list[str], verb: str, next_time: str, monkeypatch, capsys
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    module, _, function = verb.rpartition(".")
    monkeypatch.setattr(import_module(f"videorepa.{module or function}"), function, stopped)
    assert main(arguments) == 130
    assert capsys.readouterr().err == f"\nStopped. The same command {next_time}.\n"


def test_sigterm_ends_a_verb_as_ctrl_c_does(monkeypatch, capsys) -> None:
    def killed(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(import_module("videorepa.prepare"), "prepare", killed)
    assert main(["prepare", "recipes/videorepa-2b.yaml"]) == 143
    assert capsys.readouterr().err == "\nStopped. The same command goes on from here.\n"
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_compiled_code_makes_another_error_of_ends_a_verb_all_the_same(
    number: signal.Signals, monkeypatch, capsys
) -> None:
    def drawing(*_: object, **__: object) -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(60)
        except KeyboardInterrupt:
            raise ValueError("Invalid affine transformation matrix") from None

    monkeypatch.setattr(import_module("videorepa.prepare"), "prepare", drawing)
    assert main(["prepare", "recipes/videorepa-2b.yaml"]) == 128 + number
    assert capsys.readouterr().err == "\nStopped. The same command goes on from here.\n"


def test_ctrl_c_as_the_second_signal_is_not_postponed() -> None:
    with pytest.raises(Terminated), postponed() as request:
        os.kill(os.getpid(), signal.SIGTERM)
        assert isinstance(request.interrupt, Terminated)
        os.kill(os.getpid(), signal.SIGTERM)  # From the batch system, and from the launcher.
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the block goes on")


def test_signals_are_left_to_the_main_thread_and_ignored_ones_stay_so() -> None:
    def work() -> None:
        with postponed(), terminable():
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with terminable():
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_python_frees_an_object_is_not_lost(number: signal.Signals) -> None:
    class Freed:
        def __del__(self) -> None:
            os.kill(os.getpid(), number)
            sum(range(10))  # Python looks for signals between two instructions.

    hook = sys.unraisablehook
    with pytest.raises(KeyboardInterrupt) as ended, terminable():
        Freed()
        time.sleep(5)
    assert isinstance(ended.value, Terminated) == (number == signal.SIGTERM)
    assert sys.unraisablehook is hook


def test_the_help_of_evaluate_says_what_every_benchmark_needs(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    lines = capsys.readouterr().out.splitlines()
    told = [line.partition(":")[0].strip().split(", ") for line in lines if line.startswith("  ")]
    assert {*plugins.names("benchmarks"), "rated", "agreement"} <= {
        name for names in told for name in names
    }


@pytest.mark.parametrize(
    "option",
    # The last two are what a study takes by default.
    [["--set", "train=12"], ["--out", "few"], ["--shard", "0/2"]]
    + [["--out", "study"], ["--shard", "0/1"]],
)
def test_lab_s_parts_refuse_the_options_of_its_study(option: list[str], capsys) -> None:
    assert main(["lab", "contact", "contact.yaml", *option]) == 1
    assert f"Leave out {option[0]}, for `lab study` alone" in capsys.readouterr().err
