"""Text that a teacher writes without anyone's prompts: chats whose user's turn is its own too, and plain text.

A chat model that gets its template up to the place where the user speaks says what a user might; then it is given the
template's next piece, and answers (Magpie, arXiv:2406.08464). Plain text is what a model says after the token at which
documents start. Dropped is what `fault` names; nothing else is chosen, so that the rest is the teacher's distribution.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from streams import Script, Streams, Written

MARK = "lizardzoo"
"""Stands for the user's words while a template is cut in two."""
STARTS = ("<|endoftext|>", "<|begin_of_text|>")
"""Tokens known to start documents; a tokenizer without them: its BOS or EOS token."""
ASKING = 256
"""Tokens of the longest user's turn."""
PIECE, DISTINCT = 4, 0.5
"""A text repeats itself where less than this share of its pieces of so many tokens are different ones."""


def write(model: Any, tokenizer: Any, arguments: Namespace, began: float) -> None:
    """Rounds of texts behind those that the file holds, until there are enough, or time is over."""
    lines = read_lines(arguments.out)
    asked = {told(line["instruction"]) for line in lines if "instruction" in line}
    number, count, seconds = max((line["round"] for line in lines), default=-1) + 1, len(lines), 0.0
    if arguments.count is not None and count >= arguments.count:
        print(f"{arguments.out} holds {count} texts")
        return
    scripts, ends = scripts_of(tokenizer, model, arguments)
    special = set(tokenizer.all_special_ids)
    streams = Streams(
        model, scripts, ends, tokens=arguments.tokens, first_turn=ASKING, steps=arguments.steps,
        temperature=arguments.temperature,
    )  # fmt: skip
    while arguments.count is None or count < arguments.count:
        start = time.monotonic()
        if arguments.minutes is not None and start + seconds - began > 60 * arguments.minutes:
            print(f"stopped at {count:,} texts; the same command goes on")
            return
        kept, tokens, dropped = [], 0, Counter[str]()
        for text in streams.round(arguments.seed * 1_000_003 + number):
            chat = bool(scripts[text.row].bridge)
            said = [turn.strip() for turn in tokenizer.batch_decode(text.turns, skip_special_tokens=True)]
            if wrong := fault(text, said, chat, arguments.unfinished, special, asked):
                dropped[wrong] += 1
                continue
            if chat:
                asked.add(told(said[0]))
            line = {"instruction": said[0], "output": said[1]} if chat else {"text": said[0]}
            kept.append({**line, "round": number})
            tokens += sum(map(len, text.turns))
        append(arguments.out, kept)
        number, count, seconds = number + 1, count + len(kept), time.monotonic() - start
        why = ", ".join(f"{many:,} {wrong}" for wrong, many in dropped.most_common()) or "none"
        print(
            f"{len(kept):,} texts, {tokens:,} tokens in {seconds:.1f} s; {count:,} in all; dropped: {why}", flush=True
        )
        if not kept:
            raise SystemExit(f"no text of a round was taken ({why}); give more --tokens, or another teacher")


def scripts_of(tokenizer: Any, model: Any, arguments: Namespace) -> tuple[list[Script], set[int]]:
    """A script for each row, plain texts first, and the tokens that end a turn."""
    share = float(not tokenizer.chat_template) if arguments.plain is None else arguments.plain
    plain = round(share * arguments.batch)
    ends = model.generation_config.eos_token_id
    ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    scripts = []
    if plain:
        start = start_token(tokenizer, arguments.start)
        ends.add(start)
        scripts += [Script([start])] * plain
    if plain < arguments.batch:
        chat = chat_script(tokenizer)
        ends.add(chat.bridge[0])
        scripts += [chat] * (arguments.batch - plain)
    longest = max(len(script.prefix) + len(script.bridge) for script in scripts)
    if arguments.tokens < longest + 2:
        raise SystemExit(f"--tokens {arguments.tokens} has no room behind the template's {longest} tokens; give more")
    sliding = getattr(model.config, "sliding_window", None)
    if sliding and arguments.tokens > sliding:  # streams have no mask for it
        raise SystemExit(
            f"the teacher's attention sees {sliding} tokens at most, --tokens asks for {arguments.tokens}; "
            f"give --tokens {sliding}"
        )
    return scripts, ends


def chat_script(tokenizer: Any) -> Script:
    """The chat template before and behind what the user says."""
    if not tokenizer.chat_template:
        raise SystemExit("the tokenizer has no chat template, so only plain texts can be written: leave out --plain")
    messages = [{"role": "user", "content": MARK}]
    whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    before, _, behind = whole.partition(MARK)
    prefix, bridge = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, behind))
    if not prefix or not bridge or bridge[0] not in tokenizer.all_special_ids:
        raise SystemExit(
            f"the chat template has no special token behind the user's turn, where that would end: {whole!r}; "
            f"write plain texts with --plain 1"
        )
    return Script(prefix, bridge)


def start_token(tokenizer: Any, name: str | None) -> int:
    """The token that documents start with."""
    known = tokenizer.get_vocab()
    names = [name] if name else [*STARTS, tokenizer.bos_token, tokenizer.eos_token]
    found = next((known[one] for one in names if one in known), None)
    if found is None:
        raise SystemExit(f"the tokenizer has no token {names[0]!r}; name the one that starts a document by --start")
    return int(found)


def fault(text: Written, said: Sequence[str], chat: bool, cut: bool, special: set[int], asked: set[str]) -> str:
    """Why a text, which says `said`, is not taken; empty where it is. `cut`: a chat's answer may have no end.

    Plain text may always be cut, as any document is that is packed for training.
    """
    if chat and not text.whole and not (cut and len(said) > 1):
        return "without an end"
    if not all(said):
        return "empty"
    if any(not special.isdisjoint(turn) for turn in text.turns):
        return "with special tokens inside"
    if any(map(repeats, text.turns)):
        return "that repeat themselves"
    return "asked before" if chat and told(said[0]) in asked else ""


def repeats(tokens: Sequence[int]) -> bool:
    """Whether most of its pieces were there before."""
    pieces = [tuple(tokens[start : start + PIECE]) for start in range(len(tokens) - PIECE + 1)]
    return len(pieces) >= 2 * PIECE and len(set(pieces)) < DISTINCT * len(pieces)


def told(instruction: str) -> str:
    """The same for what differs in case and spaces alone."""
    return " ".join(instruction.casefold().split())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """What earlier runs wrote."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    if not all("round" in line for line in lines):
        raise SystemExit(f"{path} holds answers to prompts, without the rounds of unprompted texts; name another file")
    return lines


def append(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """All of a round, or nothing of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    if path.is_file():
        shutil.copyfile(path, partial)
    with partial.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))
    os.replace(partial, path)
