"""Short prompts to detailed ones, by a language model: what video models were trained on."""

from __future__ import annotations

import csv
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

from videorepa.data.manifest import Prompt
from videorepa.errors import UserError
from videorepa.system.files import atomic_write, csv_text
from videorepa.system.fingerprint import json_digest, weights_digest
from videorepa.system.progress import track

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
"""What a model is asked to do; its digest stands in every row."""

KEY_VARIABLE = "VIDEOREPA_API_KEY"
"""Environment variable with the endpoint's key. It goes into a header and nowhere else."""

WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before each further try."""

LONGEST_WAIT = 60.0

TIMEOUT = 120.0

STOPPING = (301, 302, 303, 307, 308, 401, 403, 404, 405)
"""Answers that any other prompt would get too."""

NEW_TOKENS = 300

COLUMNS = ("id", "caption", "detailed", "model", "instruction")

Ask = Callable[[str], str]


class _Failed(Exception):
    """One prompt cannot be refined."""


@dataclass(frozen=True)
class Refined:
    """rows: what `out` holds, in the prompts' order. asked: how many of them are new. failed: why
    the others are not there, by id."""

    out: Path
    rows: list[dict[str, str]]
    asked: int
    failed: dict[str, str]


def refine(
    prompts: Sequence[Prompt], out: Path, *, model: str, endpoint: str | None = None
) -> Refined:
    """Have each prompt's caption rewritten in detail; `out` gets a CSV that `generate` reads.

    endpoint: address of an OpenAI-compatible server, such as http://localhost:8000/v1, of which
        `model` is a model's name; its key, if it wants one, is in VIDEOREPA_API_KEY. Without one,
        `model` is the folder (or Hub id) of a causal language model for transformers, which
        answers greedily.

    Columns: id, caption, detailed, model, and the digest of the instruction. The file is written
    anew with each row, and what is there is not asked again. A server that is busy or fails is
    asked again, later each time; a prompt that gets no answer costs that prompt alone. Raises
    UserError for an answer that all prompts would get, such as a wrong key, and if `out` holds
    something else.
    """
    ask, known_as = _server(endpoint, model) if endpoint else _local(model)
    instruction = json_digest(INSTRUCTION)
    answers = _answers(out, {p.caption for p in prompts}, known_as, instruction)
    failed: dict[str, str] = {}

    def rows() -> list[dict[str, str]]:
        found = [p for p in prompts if p.caption in answers]
        values = ((p.id, p.caption, answers[p.caption], known_as, instruction) for p in found)
        return [dict(zip(COLUMNS, row, strict=True)) for row in values]

    todo = [prompt for prompt in prompts if prompt.caption not in answers]
    asked = 0
    out.parent.mkdir(parents=True, exist_ok=True)
    for prompt in track(todo, "refine", done=len(prompts) - len(todo)):
        if prompt.caption not in answers:  # Equal ones are asked once.
            try:
                answers[prompt.caption] = _cleaned(ask(prompt.caption))
            except _Failed as error:
                failed[prompt.id] = str(error)
                continue
            asked += 1
        atomic_write(out, csv_text(COLUMNS, rows()))
    return Refined(out, rows(), asked, failed)


def _answers(out: Path, captions: set[str], model: str, instruction: str) -> dict[str, str]:
    """What `out` holds already, by caption."""
    if not out.exists():
        return {}
    try:
        with out.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{out} cannot be read as CSV: {error}. Choose another --out.") from None
    if not all(tuple(row) == COLUMNS and None not in row.values() for row in rows):
        raise UserError(f"{out} exists and was not written by refine. Choose another --out.")
    others = {(row["model"], row["instruction"]) for row in rows} - {(model, instruction)}
    if others:
        theirs, digest = sorted(others)[0]
        raise UserError(
            f"{out} was refined by {theirs} with the instruction {digest}; this is {model} with "
            f"{instruction}. Choose another --out."
        )
    if foreign := [row["id"] for row in rows if row["caption"] not in captions]:
        raise UserError(
            f"{out} holds {len(foreign)} prompts that are not among those given, the first is "
            f"{foreign[0]!r}. Choose another --out."
        )
    return {row["caption"]: row["detailed"] for row in rows}


def _messages(caption: str) -> list[dict[str, str]]:
    return [
        {"role": "system", "content": INSTRUCTION},
        {"role": "user", "content": caption},
    ]


def _cleaned(answer: str) -> str:
    """The paragraph alone, on one line: without what a model thought before it, or quotes."""
    text = " ".join(re.sub(r"^.*</think>", "", answer, flags=re.DOTALL).split())
    if len(text) > 1 and text[0] + text[-1] in ('""', "“”"):
        text = text[1:-1].strip()
    if not text:
        raise _Failed("the model answered nothing")
    return text


# A server.


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A key must not follow to wherever a server points."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _server(endpoint: str, model: str) -> tuple[Ask, str]:
    if not endpoint.startswith(("http://", "https://")):
        raise UserError(f"--endpoint is an http:// or https:// address; got {endpoint!r}.")
    url = endpoint.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
    key = os.environ.get(KEY_VARIABLE, "")
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    opener = urllib.request.build_opener(_NoRedirect)

    def said(text: str) -> str:
        return " ".join((text.replace(key, "***") if key else text).split())[:300]

    def ask(caption: str) -> str:
        body = json.dumps({"model": model, "messages": _messages(caption)}).encode()
        request = urllib.request.Request(url, body, headers)
        for wait in (*WAITS, None):
            try:
                with opener.open(request, timeout=TIMEOUT) as response:
                    return _content(response.read(), said)
            except urllib.error.HTTPError as error:
                reason = (
                    f"{url} answered {error.code} {said(error.read().decode(errors='replace'))}"
                )
                if error.code in STOPPING:
                    raise UserError(
                        f"{reason}. Check --endpoint, --model and {KEY_VARIABLE}."
                    ) from None
                if error.code != 429 and error.code < 500:
                    raise _Failed(reason) from None
                wait = _asked_for(error, wait)
            except TimeoutError:
                reason = f"{url} did not answer within {TIMEOUT:.0f} s"
            except (urllib.error.URLError, HTTPException, OSError) as error:
                reason = f"{url} cannot be reached: {said(str(error))}"
                if wait is None:
                    raise UserError(f"{reason}. Is the server running?") from None
            if wait is None:
                raise _Failed(f"{reason}, {len(WAITS) + 1} times")
            time.sleep(wait)
        raise AssertionError("unreachable")

    return ask, model


def _asked_for(error: urllib.error.HTTPError, wait: float | None) -> float | None:
    """The wait that the server asks for, if it names one in seconds."""
    named = error.headers.get("Retry-After", "")
    if wait is None or not named.isdecimal():
        return wait
    return min(float(named), LONGEST_WAIT)


def _content(body: bytes, said: Callable[[str], str]) -> str:
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        content = None
    if not isinstance(content, str):
        found = said(body.decode(errors="replace"))
        raise _Failed(f"the server's answer holds no message: {found}")
    return content


# A model on this machine.


def _local(model: str) -> tuple[Ask, str]:
    from videorepa.system.hub import local_copy, quieten_libraries

    folder = local_copy(model)
    quieten_libraries()
    loaded: list[Any] = []

    def load() -> tuple[Any, Any]:
        """When it is first asked: a finished file needs no model."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from videorepa.system.device import compute_dtype, pick_device

        if not loaded:
            where = pick_device()
            try:
                tokenizer = AutoTokenizer.from_pretrained(folder)
                dtype = compute_dtype("auto", where)
                live: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
            except (OSError, ValueError, KeyError) as error:
                raise UserError(
                    f"{model} could not be loaded as a causal language model: {str(error)[:300]}"
                ) from None
            loaded.extend((tokenizer, live.to(where).eval()))
        return loaded[0], loaded[1]

    def ask(caption: str) -> str:
        tokenizer, live = load()
        if tokenizer.chat_template:
            text = tokenizer.apply_chat_template(
                _messages(caption), tokenize=False, add_generation_prompt=True
            )
            tokens = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        else:
            text = f"{INSTRUCTION}\n\nCaption: {caption}\n\nDescription:"
            tokens = tokenizer(text, return_tensors="pt")
        ids = tokens["input_ids"].to(live.device)
        made = live.generate(
            ids,
            attention_mask=ids.new_ones(ids.shape),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        )
        return tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)

    return ask, f"{folder.name} {weights_digest(folder)}"
