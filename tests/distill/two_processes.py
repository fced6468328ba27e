"""What each of two processes does for `test_processes.py`: runs of `distill`, each in a folder of its own.

`torchrun --nproc-per-node 2 tests/distill/two_processes.py FOLDER`; FOLDER holds student/, texts.json and recipe.json.
"""

import contextlib
import gc
import json
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer

import lizardzoo as lz
from lizardzoo.distill import distill
from lizardzoo.distill.processes import sharded
from lizardzoo.distill.trainer import NonFiniteError, StepLog


class Interrupted(Exception):
    """The machine went away."""


def main(folder: Path) -> None:
    """Every run, one after the other; what is not in their folders goes to found<RANK>.json."""
    gc.freeze()  # the trainers collect after each run, through all modules
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    data, recipe = (json.loads((folder / f"{name}.json").read_text()) for name in ("texts", "recipe"))

    def train(name, student=None, **changes):
        given = {"data": data, "recipe": recipe, "micro_batch_size": 1, "checkpoint_every": 4, "progress": False}
        student = student or lz.from_pretrained(folder / "student")
        return distill(student, tokenizer=tokenizer, output_dir=folder / name, **{**given, **changes})

    train("ddp")
    student = train("fsdp2", shard=True, gradient_checkpointing=True)
    saved = lz.from_pretrained(folder / "fsdp2" / "final").state_dict()
    found = {"returned": all(torch.equal(value, saved[name]) for name, value in student.state_dict().items())}
    train("other teacher", shard=True, stages=["finetune"], teacher=folder / "teacher")

    train("continued by two", resume=True, stages=["transfer"])
    with after_step(11, interrupt), contextlib.suppress(Interrupted):
        train("interrupted with two", shard=True, stages=["transfer"])

    rank = torch.distributed.get_rank()
    found["frozen"], found["here"] = frozen_numbers(student.requires_grad_(False))
    try:
        with after_step(2, break_mixer if rank == 1 else lambda model: None):
            train("broken", stages=["transfer"])
    except NonFiniteError as error:
        found["error"] = str(error)
    (folder / f"found{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


@contextlib.contextmanager
def after_step(step, action):
    """Inside, `action(model)` runs right after that step has been logged."""
    original = StepLog.on_log

    def on_log(self, args, state, control, **kwargs):
        original(self, args, state, control, **kwargs)
        if state.global_step == step:
            action(kwargs["model"])

    StepLog.on_log = on_log
    try:
        yield
    finally:
        StepLog.on_log = original


def interrupt(model):
    raise Interrupted


def break_mixer(model):
    with torch.no_grad():
        next(model.mixers()[0].parameters()).fill_(float("nan"))


def frozen_numbers(model):
    """How many numbers the weights of a frozen model have, and how many of them this process holds when sharded."""
    with sharded(model, torch.device("cpu")) as working:
        held = sum(p.to_local().numel() for p in working.parameters() if isinstance(p, DTensor))
    return sum(parameter.numel() for parameter in model.parameters()), held


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
