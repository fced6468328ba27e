"""`generate`: a model speaks."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from transformers import TextStreamer, set_seed

from lizardzoo.cli.base import app
from lizardzoo.cli.models import DeviceOption, Dtype, DtypeOption, load_model, load_tokenizer
from lizardzoo.errors import LizardzooError


@app.command()
def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id.")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to answer, or to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after so many tokens.")] = 256,
    chat: Annotated[
        bool | None,
        typer.Option(help="Put the prompt as a question to a chat model; by default where there is a chat template."),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
) -> None:
    """Let a model speak; the text appears as it is made.

    \b
      lizardzoo generate runs/first/final "Why do lizards lose their tails?"
      lizardzoo generate runs/first/final "Once upon a time" --no-chat \\
          --temperature 0.8 --seed 1
    """
    tokenizer = load_tokenizer(model)
    if chat and not tokenizer.chat_template:
        raise LizardzooError(f"the tokenizer of {model!r} has no chat template; use --no-chat")
    if chat or (chat is None and tokenizer.chat_template):
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    if inputs["input_ids"].shape[-1] == 0:
        raise LizardzooError("the prompt is empty; write something to continue")
    speaker = load_model(model, dtype, device)
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature}
    set_seed(seed)
    speaker.generate(
        input_ids=inputs["input_ids"].to(speaker.device),
        attention_mask=inputs["attention_mask"].to(speaker.device),
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        **sampling,
    )
