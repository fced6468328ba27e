"""Several processes: the losses of one, whole or sharded, resumed by another number of them; errors in all.

Two processes on gloo run `two_processes.py` once; the tests read what they left.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

import lizardzoo as lz
from lizardzoo.distill import distill, load_data, processes
from lizardzoo.distill.trainer import read_log
from lizardzoo.errors import LizardzooError
from lizardzoo.loading import read_tokenizer

HERE = Path(__file__).parent


class Interrupted(Exception):
    """The machine went away."""


@pytest.fixture(scope="module")
def one(tiny_folder, layers, texts, recipe, tmp_path_factory):
    """A folder with a student, and a function that trains it in this process: `one(name, **changes)`."""
    folder = tmp_path_factory.mktemp("processes")
    torch.manual_seed(0)
    lz.linearize(tiny_folder, layers).save_pretrained(folder / "student")
    recipe = dataclasses.replace(recipe, transfer=dataclasses.replace(recipe.transfer, steps=30))
    tokenizer = read_tokenizer(tiny_folder)
    tokenizer.save_pretrained(folder / "student")
    shutil.copytree(tiny_folder, folder / "teacher")
    (folder / "texts.json").write_text(json.dumps(texts))
    (folder / "recipe.json").write_text(json.dumps(recipe.to_dict()))

    def train(name, **changes):
        given = {"data": texts, "recipe": recipe, "micro_batch_size": 1, "checkpoint_every": 4, "progress": False}
        student = lz.from_pretrained(folder / "student")
        return distill(student, tokenizer=tokenizer, output_dir=folder / name, **{**given, **changes})

    train.folder = folder
    return train


@pytest.fixture(scope="module")
def two(one):
    """The folder of `one` when two processes have done their runs there too."""
    from lizardzoo.distill.trainer import StepLog

    original = StepLog.on_log

    def on_log(self, args, state, control, **kwargs):
        original(self, args, state, control, **kwargs)
        if state.global_step == 11:
            raise Interrupted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepLog, "on_log", on_log)
        with pytest.raises(Interrupted):
            one("continued by two", stages=["transfer"])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "error"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1]), *sys.path])
    result = subprocess.run(
        [*launch, HERE / "two_processes.py", one.folder],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    one("one")
    return one.folder


def same_log(folder, expected, stage):
    """The log entries of a stage are the same within fp32 rounding."""
    logs = [[e for e in read_log(f / "log.jsonl") if e["stage"] == stage] for f in (folder, expected)]
    assert len(logs[0]) == len(logs[1]) > 0
    for found, entry in zip(*logs, strict=True):
        flat, wanted = ({**e, **e.get("layer_error", {})} for e in (found, entry))
        for name in wanted.keys() - {"layer_error", "stage"}:
            assert flat[name] == pytest.approx(wanted[name], rel=2e-5), (name, entry["step"])
    return [entry["loss"] for entry in logs[0]]


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_two_processes_learn_as_one_with_twice_the_accumulation(name, two):
    losses = same_log(two / name, two / "one", "transfer")
    assert len(losses) == 30
    assert losses[-1] < 0.6 * losses[0]
    assert len(same_log(two / name, two / "one", "finetune")) == 6
    one, found = (lz.from_pretrained(two / n / "final").state_dict() for n in ("one", name))
    for key, value in one.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-4, msg=key)
    assert {path.name for path in (two / name).iterdir()} == {path.name for path in (two / "one").iterdir()}


def test_a_teacher_of_its_own_may_be_sharded_too(two, one):
    one("other teacher of one", stages=["finetune"], teacher=two / "teacher")
    same_log(two / "other teacher", two / "other teacher of one", "finetune")


def test_a_run_goes_on_with_another_number_of_processes(two, one):
    same_log(two / "continued by two", two / "one", "transfer")
    checkpoints = two / "interrupted with two" / "checkpoints" / "transfer"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["checkpoint-4", "checkpoint-8"]
    one("interrupted with two", stages=["transfer"], resume=True)
    same_log(two / "interrupted with two", two / "one", "transfer")


def test_each_process_holds_its_part_and_gives_back_the_whole_model(two):
    for rank in (0, 1):
        found = json.loads((two / f"found{rank}.json").read_text())
        assert found["returned"]
        assert found["here"] == pytest.approx(found["frozen"] / 2, rel=0.01)


def test_what_one_process_finds_stops_them_all(two):
    for rank in (0, 1):
        error = json.loads((two / f"found{rank}.json").read_text())["error"]
        assert error.startswith("transfer, step 3: the error of layer 0 is not finite; no checkpoint was written")
    assert not (two / "broken" / "transfer").exists()


def test_an_epoch_leaves_out_what_fills_no_batch_however_it_is_split(one, recipe, texts, tiny_tokenizer):
    assert len(load_data(texts[:5], tiny_tokenizer, 48)) % recipe.transfer.batch_size
    stage = dataclasses.replace(recipe.transfer, steps=None, epochs=2)
    recipe = dataclasses.replace(recipe, transfer=stage)
    for micro in (1, 4):
        one(f"micro {micro}", recipe=recipe, stages=["transfer"], micro_batch_size=micro, data=texts[:5])
    whole, split = ([e["epoch"] for e in read_log(one.folder / f"micro {m}" / "log.jsonl")] for m in (4, 1))
    assert whole == split
    assert whole[-1] == 2


def test_the_ready_config_launches_plain_data_parallel_processes():
    config = load_config_from_file(str(HERE.parents[1] / "examples" / "accelerate.yaml"))
    assert (config.distributed_type, config.mixed_precision, config.num_processes) == ("MULTI_GPU", "no", 2)


def test_sharding_alone_or_from_a_device_is_refused(one, monkeypatch):
    with pytest.raises(LizardzooError, match=r"shard=True, but there is one process.*torchrun --nproc-per-node N"):
        one("alone", shard=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LizardzooError, match=r"shard=True, but the model is on meta, whole; load it on the CPU"):
        processes.check_shard(torch.nn.Linear(2, 2, device="meta"))
    assert not (one.folder / "alone").exists()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("ACCELERATE_USE_FSDP", "true", r"accelerate's FSDP would wrap .* MULTI_GPU, and pass shard=True"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "accelerate's DEEPSPEED"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", r'mixed_precision=bf16 would change .*mixed_precision: "no"'),
    ],
)
def test_what_accelerate_would_do_to_the_model_is_refused(name, value, words, one, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(LizardzooError, match=words):
        one("refused")
    assert not (one.folder / "refused").exists()
