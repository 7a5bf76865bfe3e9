"""Has a language model rewrite short prompts in detail, as video models were trained on them."""

from __future__ import annotations

import csv
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from videorepa.data.manifest import Prompt
from videorepa.errors import UserError
from videorepa.system.files import atomic_write, check_is_file, csv_text
from videorepa.system.fingerprint import json_digest, weights_digest
from videorepa.system.progress import track
from videorepa.system.wording import count, shown

FIRST_FRAME = """\


The model continues an image, which the user describes after the caption. Let the shot begin with \
exactly what the image shows, say nothing that contradicts it, and spend your words on what \
happens from there on; do not speak of an image or a frame."""
"""What the task has besides, where prompts have descriptions of their first frames."""

INSTRUCTION = """\
You write captions for a text-to-video model that was trained on long, literal descriptions. \
Rewrite the user's short caption as one such description of a single continuous shot.

Keep everything the caption says: the same objects, materials, numbers, colours and positions, \
and the same action with the same outcome. Add nothing that would change the event: no further \
actors, no second action, no cut, no text on screen. You may add what any such scene has: the \
surroundings, surfaces, light, the look of the materials, and where the camera stands. Say in \
plain words how the action unfolds from beginning to end: what moves, in which direction, what it \
touches, and what happens to it then. Do not explain why it happens, and do not say how it is to \
be judged.

Write one paragraph of 60 to 120 words in the present tense, in the language of the caption. \
Answer with the paragraph alone."""
"""The model's task. Every row holds its digest."""

KEY_VARIABLE = "VIDEOREPA_API_KEY"
"""Environment variable with the server's key, which is sent in a header and written nowhere."""

WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before each retry."""

LONGEST_WAIT = 60.0
"""Longest wait before a retry, in seconds, even if the server asks for a longer one."""

TIMEOUT = 120.0
"""Seconds that a server may be silent."""

STOPPING = (301, 302, 303, 307, 308, 401, 403, 404, 405)
"""HTTP statuses that end `refine`, because every other prompt would get them too."""

WRITING = 0.1
"""Most of the time that writing may take. A file that is written anew with each row takes ever
longer, with thousands of rows longer than a fast server's answers."""

NEW_TOKENS = 300
"""Longest answer of a model on this machine, in tokens."""

COLUMNS = ("id", "caption", "detailed", "model", "instruction")

SHOWN_COLUMNS = ("image", "first_frame")
"""Further columns of lists whose prompts have images, or descriptions of them."""

Ask = Callable[[str], str]
"""Gives a model's answer to a caption, with the first frame's description if there is one."""


class _Failed(Exception):
    """One prompt cannot be refined."""


class _Busy(Exception):
    """The server may answer after `wait` seconds; 0 if it names no time."""

    def __init__(self, reason: str, wait: float) -> None:
        super().__init__(reason)
        self.wait = wait


@dataclass(frozen=True)
class Refined:
    """What `refine` wrote.

    Attributes:
      out: The CSV file.
      rows: The file's rows, in the prompts' order.
      asked: How many captions the model has rewritten this time.
      failed: Why a prompt has no row, by its id.
    """

    out: Path
    rows: list[dict[str, str]]
    asked: int
    failed: dict[str, str]


def refine(
    prompts: Sequence[Prompt],
    out: Path,
    *,
    model: str,
    endpoint: str | None = None,
    first_frame: str | None = None,
) -> Refined:
    """Have each prompt's caption rewritten in detail, into a CSV file that `generate` reads.

    The columns are id, caption, detailed, model, and the digest of the instruction; and image, as
    the list has it, for prompts that continue images. The file is written anew with each row, or
    less often where that would take more than a tenth of the time, and whenever `refine` ends. The
    model is not asked again for a row that is there. A server that is busy or fails is asked again,
    with longer and longer waits. A prompt that gets no complete answer is left out.

    Args:
      prompts: The prompts, whose captions are rewritten. Equal captions are rewritten once.
      out: The CSV file to write or to continue.
      model: With an endpoint, the server's name of a model; otherwise the folder (or Hub id) of a
        causal language model for transformers, which answers greedily.
      endpoint: Address of an OpenAI-compatible server, such as http://localhost:8000/v1. The
        environment variable VIDEOREPA_API_KEY holds its key, if it needs one.
      first_frame: The column of the list that describes each prompt's image, which the model reads
        beside the caption.

    Raises:
      UserError: Every prompt would fail, as with a wrong key; a description lacks; or `out` holds
        something else.
    """
    instruction = INSTRUCTION + (FIRST_FRAME if first_frame else "")
    shown = [name for name in SHOWN_COLUMNS if _has(name, prompts, first_frame)]
    columns = (*COLUMNS, *shown)
    about = {prompt.id: _about(prompt, shown, first_frame) for prompt in prompts}
    ask, model_name = (
        _local(model, instruction) if endpoint is None else _server(endpoint, model, instruction)
    )
    digest = json_digest(instruction)
    before = _earlier(out, columns, {_asked(row) for row in about.values()}, model_name, digest)
    answers = {_asked(row): row["detailed"] for row in before}
    failed: dict[str, str] = {}

    def rows() -> list[dict[str, str]]:
        made = {"model": model_name, "instruction": digest}
        return [
            row | {"detailed": answers[_asked(row)]} | made
            for row in about.values()
            if _asked(row) in answers
        ]

    todo = [prompt for prompt in prompts if _asked(about[prompt.id]) not in answers]
    asked = 0
    out.parent.mkdir(parents=True, exist_ok=True)
    is_written, next_write = rows() == before, 0.0

    def write() -> float:
        """Write the file, and give the time from which it may be written again."""
        begun = time.monotonic()
        atomic_write(out, csv_text(columns, rows()))
        ended = time.monotonic()
        return ended + (ended - begun) / WRITING

    try:
        for prompt in track(todo, "refine", done=len(prompts) - len(todo)):
            question = _asked(about[prompt.id])
            if question in answers:
                continue
            try:
                answers[question] = _cleaned(ask(question))
            except _Failed as error:
                failed[prompt.id] = str(error)
                continue
            asked, is_written = asked + 1, False
            if time.monotonic() >= next_write:
                next_write, is_written = write(), True
    finally:
        if not is_written:
            write()
    return Refined(out, rows(), asked, failed)


def _has(name: str, prompts: Sequence[Prompt], first_frame: str | None) -> bool:
    if name == "first_frame":
        return first_frame is not None
    return any(name in prompt.row for prompt in prompts)


def _about(prompt: Prompt, shown: Sequence[str], first_frame: str | None) -> dict[str, str]:
    """What a prompt's row has besides the answer. Raises UserError if its description lacks."""
    row = {"id": prompt.id, "caption": prompt.caption}
    row |= {name: str(prompt.row.get(name, "")) for name in shown}
    if first_frame is not None:
        row["first_frame"] = " ".join(str(prompt.row.get(first_frame, "")).split())
        if not row["first_frame"]:
            raise UserError(
                f"The prompt {prompt.id!r} has no {first_frame!r}, the column that describes first "
                "frames. Fill it in for each prompt, or leave --first-frame out."
            )
    return row


def _asked(row: Mapping[str, str]) -> str:
    """What the model is asked: the caption, and what its first frame shows where that is told."""
    frame = row.get("first_frame")
    return f"{row['caption']}\n\nThe image shows: {frame}" if frame else row["caption"]


def _earlier(
    out: Path, columns: tuple[str, ...], questions: set[str], model: str, instruction: str
) -> list[dict[str, str]]:
    """Read the rows that `out` holds already. Raises UserError if they are of something else."""
    if not out.exists():
        return []
    try:
        check_is_file(out)
        with out.open(encoding="utf-8", newline="") as file:
            table = csv.DictReader(file, strict=True)
            header, rows = tuple(table.fieldnames or ()), list(table)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{out} cannot be read as CSV: {error}. Choose another --out.") from None
    is_ragged = any(None in row or None in row.values() for row in rows)
    if header not in ((), columns) or is_ragged:
        raise UserError(
            f"{out} exists and was not written by refine with the columns {', '.join(columns)}. "
            "Choose another --out."
        )
    others = {(row["model"], row["instruction"]) for row in rows} - {(model, instruction)}
    if others:
        other_model, other_instruction = min(others)
        raise UserError(
            f"{out} was refined by {other_model} with the instruction {other_instruction}; this is "
            f"{model} with {instruction}. Choose another --out."
        )
    if foreign := [row["id"] for row in rows if _asked(row) not in questions]:
        raise UserError(
            f"{out} holds {count(len(foreign), 'prompt')} that the list of prompts lacks; the "
            f"first is {foreign[0]!r}. Choose another --out."
        )
    return rows


def _messages(instruction: str, question: str) -> list[dict[str, str]]:
    return [
        {"role": "system", "content": instruction},
        {"role": "user", "content": question},
    ]


def _cleaned(answer: str) -> str:
    """Put the paragraph on one line, without quotes and without the reasoning before it."""
    text = " ".join(re.sub(r"^.*</think>", "", answer, flags=re.DOTALL).split())
    if len(text) > 1 and text[0] + text[-1] in ('""', "“”"):
        text = text[1:-1].strip()
    if not text:
        raise _Failed("the model answered nothing")
    return text


# A server.


def _server(endpoint: str, model: str, instruction: str) -> tuple[Ask, str]:
    from huggingface_hub import InferenceClient
    from huggingface_hub.errors import HTTPError

    endpoint = endpoint.strip()
    if not _is_address(endpoint):
        without_user = re.sub(r"//[^/]*@", "//***@", endpoint)
        raise UserError(
            "--endpoint is an http:// or https:// address without a user, ? and #, such as "
            f"http://localhost:8000/v1; got {shown(without_user)}. A key goes into "
            f"{KEY_VARIABLE}."
        )
    url = endpoint.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
    key = _key()
    # Without any key, the client would look for one of the Hub's.
    client = InferenceClient(base_url=url, api_key=key or "none", timeout=TIMEOUT)

    def without_key(text: str) -> str:
        return " ".join((text.replace(key, "***") if key else text).split())[:300]

    def prepare(request: Any) -> None:
        if not key:
            request.headers.pop("authorization")

    def check(response: Any) -> None:
        if response.is_success:
            return
        status = response.status_code
        reason = f"{url} answered {status} {without_key(response.read().decode(errors='replace'))}"
        if status in STOPPING:
            raise UserError(f"{reason}. Check --endpoint, --model and {KEY_VARIABLE}.")
        if status != 429 and status < 500:
            raise _Failed(reason)
        wait = response.headers.get("Retry-After", "")
        raise _Busy(reason, min(float(wait), LONGEST_WAIT) if wait.isdecimal() else 0.0)

    def ask(caption: str) -> str:
        for wait in (*WAITS, None):
            try:
                with _session_hooks(prepare, check):
                    messages = _messages(instruction, caption)
                    answer = client.chat.completions.create(messages, model=model)
                return _content(answer, without_key)
            except ValueError as error:
                raise _Failed(
                    f"the server's answer holds no message: {without_key(str(error))}"
                ) from None
            except _Busy as busy:
                reason, wait = str(busy), wait and (busy.wait or wait)
            except TimeoutError:
                reason = f"{url} did not answer within {TIMEOUT:g} s"
            except HTTPError as error:
                reason = f"{url} cannot be reached: {without_key(str(error))}"
                if wait is None:
                    raise UserError(f"{reason}. Is the server running?") from None
            if wait is None:
                raise _Failed(f"{reason}, {len(WAITS) + 1} times")
            time.sleep(wait)
        raise AssertionError("unreachable")

    return ask, model


def _is_address(endpoint: str) -> bool:
    from huggingface_hub import get_session

    try:
        # Each raises for what the other lets pass, some of it only when it asks the server.
        get_session().build_request("POST", endpoint)
        parts = urlsplit(endpoint)
        (parts.hostname or "").encode("idna")
        has_port = parts.port != 0
    except Exception:
        return False
    is_plain = has_port and not (parts.username or parts.query or parts.fragment)
    return is_plain and parts.scheme in ("http", "https") and bool(parts.hostname)


def _key() -> str:
    """Read the server's key, or "". Raises UserError, without showing the key, if it is faulty."""
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError(
            f"{KEY_VARIABLE} holds a line break or another character that no key has. Set it again."
        )
    return key


@contextmanager
def _session_hooks(prepare: Callable[[Any], None], check: Callable[[Any], None]) -> Iterator[None]:
    """Replace the hooks of the Hub's session.

    The session's own hook refuses every request in the Hub's offline mode, even one to this
    machine. `check` sees a redirect before the session sends the key along with it, and it sees
    errors before the client, which cannot read all of them.
    """
    from huggingface_hub import get_session

    session = get_session()
    hooks = session.event_hooks
    session.event_hooks = {"request": [prepare], "response": [check]}
    try:
        yield
    finally:
        session.event_hooks = hooks


def _content(answer: Any, without_key: Callable[[str], str]) -> str:
    try:
        choice = answer.choices[0]
        content, end = choice.message.content, choice.finish_reason
    except (LookupError, TypeError, AttributeError):
        content = end = None
    if not isinstance(content, str):
        values = {key: value for key, value in dict(answer).items() if value is not None}
        raise _Failed(f"the server's answer holds no message: {without_key(str(values))}")
    if end == "length":
        raise _Failed("the server cut the answer off at its limit of tokens; raise that limit")
    return content


# A model on this machine.


def _local(model: str, instruction: str) -> tuple[Ask, str]:
    from videorepa.system.hub import local_copy, quieten_libraries

    folder = local_copy(model)
    quieten_libraries()

    @cache
    def load() -> tuple[Any, Any]:
        """Load the model when it is first asked, because a finished file needs none."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from videorepa.system.device import compute_dtype, pick_device

        device = pick_device()
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
            dtype = compute_dtype("auto", device)
            live: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"{model} could not be loaded as a causal language model: {str(error)[:300]}"
            ) from None
        return tokenizer, live.to(device).eval()

    def ask(caption: str) -> str:
        tokenizer, live = load()
        if tokenizer.chat_template:
            text = tokenizer.apply_chat_template(
                _messages(instruction, caption), tokenize=False, add_generation_prompt=True
            )
            tokens = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        else:
            text = f"{instruction}\n\nCaption: {caption}\n\nDescription:"
            tokens = tokenizer(text, return_tensors="pt")
        ids = tokens["input_ids"].to(live.device)
        answer = live.generate(
            ids,
            attention_mask=ids.new_ones(ids.shape),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        )[0, ids.shape[1] :]
        if len(answer) == NEW_TOKENS:
            raise _Failed(f"the model's answer does not end within {NEW_TOKENS} tokens")
        return tokenizer.decode(answer, skip_special_tokens=True)

    return ask, f"{folder.name} {weights_digest(folder)}"
