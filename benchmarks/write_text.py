"""Training text that the teacher itself wrote, sampled; data for `lizardzoo distill --data`.

    python benchmarks/write_text.py --out out/written.jsonl --minutes 10             # without anyone's prompts
    python benchmarks/write_text.py --out out/written.jsonl --minutes 10 --prompts alpaca_prompts.jsonl.gz --count 4000

A teacher's own text is what a student is to follow it on (on-policy distillation). Without prompts a chat model
writes the user's turn as well, and a share of plain text if asked for, other models plain text alone (`unprompted.py`
says how). Lines have "instruction" and "output", or "text"; with prompts, the prompt's "instruction" and "input", whose
licence follows along. The same command goes on behind the lines that are there; every batch, or round, has a seed of
its own, so that stopping and going on gives the same text.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.utils import logging as transformers_logging
from unprompted import write

from lizardzoo.smollm2 import load_teacher


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the .jsonl file to write, or to go on with")
    parser.add_argument("--prompts", type=Path, help=".jsonl (also .gz) with an instruction a line; default: none")
    parser.add_argument("--count", type=int, help="answers in all; without prompts: stop after the round that has them")
    parser.add_argument("--teacher", type=Path, help="folder of the teacher; default: lizardzoo.smollm2's")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--batch", type=int, help="texts at once; default: 128 with prompts, 1024 without")
    parser.add_argument(
        "--tokens", type=int, help="longest answer, default: 512; without prompts longest chat, template included: 768"
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="1 samples the teacher's own distribution")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, help="stop when so many are over, behind a whole batch or round")
    alone = parser.add_argument_group("without prompts")
    alone.add_argument("--plain", type=float, help="share of plain text; default: 0, without a chat template 1")
    alone.add_argument("--start", help="the token that plain text starts with; default: the tokenizer's")
    alone.add_argument("--unfinished", action="store_true", help="take answers that are cut at --tokens as well")
    alone.add_argument("--steps", type=int, default=1536, help="tokens of a round in which texts are begun")
    given = parser.parse_args(argv)
    if given.prompts is None and given.count is None and given.minutes is None:
        parser.error("without --prompts there is no end: give --minutes or --count")
    if given.prompts is not None and (given.plain is not None or given.start is not None):
        parser.error("--plain and --start are for texts without --prompts")
    if given.plain is not None and not 0 <= given.plain <= 1:
        parser.error(f"--plain is a share from 0 to 1, got {given.plain}")
    given.batch = given.batch or (1024 if given.prompts is None else 128)
    given.tokens = given.tokens or (768 if given.prompts is None else 512)
    return given


def main(argv: list[str] | None = None) -> None:
    """Sample and write."""
    began = time.monotonic()
    arguments = parse(argv)
    transformers_logging.disable_progress_bar()
    if arguments.prompts is None:
        model, tokenizer = obtain(arguments)
        write(model, tokenizer, arguments, began)
        return
    prompts = list(read(arguments.prompts))[: arguments.count]
    done = len(arguments.out.read_bytes().splitlines()) if arguments.out.is_file() else 0
    if done >= len(prompts):
        print(f"{arguments.out} holds all {done} answers")
        return
    if done % arguments.batch:
        raise SystemExit(f"{arguments.out} holds {done} answers, which is no whole number of batches; give its --batch")
    model, tokenizer = obtain(arguments)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for start in range(done, len(prompts), arguments.batch):
        if arguments.minutes is not None and time.monotonic() - began > 60 * arguments.minutes:
            print(f"stopped at {start} of {len(prompts)} answers; the same command goes on")
            return
        batch = prompts[start : start + arguments.batch]
        set_seed(arguments.seed * 1_000_003 + start)
        said = answers(model, tokenizer, batch, arguments)
        lines = "".join(json.dumps({**prompt, "output": text}) + "\n" for prompt, text in zip(batch, said))
        with arguments.out.open("a", encoding="utf-8") as file:
            file.write(lines)
        print(f"{start + len(batch)} of {len(prompts)} answers", flush=True)


def read(path: Path) -> Iterator[dict[str, str]]:
    """The prompts: instruction and input of each line."""
    raw = path.read_bytes()
    for number, line in enumerate((gzip.decompress(raw) if path.suffix == ".gz" else raw).decode().split("\n"), 1):
        if line.strip():
            row = json.loads(line)
            if not isinstance(row.get("instruction"), str):
                raise SystemExit(f"{path}, line {number}: expected an instruction, got {', '.join(row)}")
            yield {"instruction": row["instruction"], "input": row.get("input") or ""}


def obtain(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The teacher where it runs fastest, and a tokenizer that pads on the left."""
    dtype = getattr(torch, arguments.dtype)
    if arguments.teacher is None:
        model, tokenizer = load_teacher(dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(arguments.teacher, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(arguments.teacher, padding_side="left")
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def answers(model: Any, tokenizer: Any, batch: list[dict[str, str]], arguments: argparse.Namespace) -> list[str]:
    """One sampled answer for each prompt, as a chat where the tokenizer knows how."""
    texts = [f"{prompt['instruction']}\n\n{prompt['input']}".strip() for prompt in batch]
    if tokenizer.chat_template:
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
            for text in texts
        ]  # fmt: skip
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
    tokens = model.generate(
        **inputs, max_new_tokens=arguments.tokens, do_sample=True, temperature=arguments.temperature, top_k=0,
        top_p=1.0, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    said = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in said]


if __name__ == "__main__":
    main()
