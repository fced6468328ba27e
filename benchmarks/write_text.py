"""Training text that the teacher itself wrote: its answers to prompts, sampled; data for `lizardzoo distill --data`.

    python benchmarks/write_text.py --prompts alpaca_prompts.jsonl.gz --out out/written.jsonl --count 4000 --minutes 10

A teacher's own text is what a student is to follow it on (on-policy distillation). Each line of the result has the
prompt's "instruction" (and "input") and the answer as "output". The same command goes on behind the lines that are
there; every batch has a seed of its own, so that stopping and going on gives the same text.
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

from lizardzoo.smollm2 import load_teacher


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--prompts", type=Path, required=True, help=".jsonl (also .gz) with an instruction a line")
    parser.add_argument("--out", type=Path, required=True, help="the .jsonl file to write, or to go on with")
    parser.add_argument("--count", type=int, help="answers in all; default: one for each prompt")
    parser.add_argument("--teacher", type=Path, help="folder of the teacher; default: lizardzoo.smollm2's")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--batch", type=int, default=128, help="prompts answered at once")
    parser.add_argument("--tokens", type=int, default=512, help="longest answer")
    parser.add_argument("--temperature", type=float, default=1.0, help="1 samples the teacher's own distribution")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, help="stop after the batch in which so many are over")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Sample and write."""
    began = time.monotonic()
    arguments = parse(argv)
    prompts = list(read(arguments.prompts))[: arguments.count]
    done = len(arguments.out.read_bytes().splitlines()) if arguments.out.is_file() else 0
    if done >= len(prompts):
        print(f"{arguments.out} holds all {done} answers")
        return
    if done % arguments.batch:
        raise SystemExit(f"{arguments.out} holds {done} answers, which is no whole number of batches; give its --batch")
    transformers_logging.disable_progress_bar()
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
