"""A whole run: what it leaves behind, exact resume, and refusals that write nothing."""

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json

import pytest
import torch
from transformers.utils import logging

import lizardzoo as lz
from lizardzoo.distill import run as run_module
from lizardzoo.distill.data import load_data, names_of
from lizardzoo.distill.trainer import last_checkpoint, read_log
from lizardzoo.errors import LizardzooError


class Interrupted(Exception):
    """The machine went away."""


def interrupt(_):
    raise Interrupted


def contents(folder):
    """Every file under a folder with the hash of what it holds."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_run_leaves_both_models_the_log_the_plots_and_the_recipe(train, student, batch, recipe, pictures):
    train()
    expected = {"final", "layer_error.png", "log.jsonl", "loss.png", "recipe.json", "training.json", "transfer"}
    assert {path.name for path in train.folder.iterdir()} == expected
    for plot in ("loss.png", "layer_error.png"):
        assert (train.folder / plot).read_bytes().startswith(b"\x89PNG")
    assert json.loads((train.folder / "recipe.json").read_text())["recipe"] == recipe.to_dict()
    assert [len(train.log(stage)) for stage in ("transfer", "finetune")] == [10, 6]
    with torch.no_grad():
        final = lz.from_pretrained(train.folder / "final")
        assert torch.equal(final(batch).logits, student(batch).logits)
        assert final.config.use_cache
        assert not torch.equal(lz.from_pretrained(train.folder / "transfer")(batch).logits, final(batch).logits)
    for name in ("transfer", "final"):
        assert (train.folder / name / "tokenizer.json").is_file()


def test_a_run_tells_what_it_was_run_with(train, texts, tmp_path):
    files = [tmp_path / "a" / "x.txt", tmp_path / "b" / "x.txt", tmp_path / "y.txt"]
    for number, path in enumerate(files):
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(texts[number::3]))
    train(data=[files[0], str(files[1]), files[2]], stages=["transfer"], micro_batch_size=2)
    train(stages=["finetune"], resume=True)
    told = json.loads((train.folder / "training.json").read_text())
    first, second = told["transfer"], told["finetune"]
    names = ["a/x.txt", "b/x.txt", "y.txt"]
    assert first["data"] == {
        name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in zip(names, files, strict=True)
    }
    assert second["data"] == {}  # texts, given in Python
    assert (first["micro_batch_size"], second["micro_batch_size"]) == (2, None)
    assert (first["device"], first["processes"]) == ("cpu", 1)
    assert first["seconds"] > 0
    assert first["versions"]["torch"] == importlib.metadata.version("torch")


def test_a_data_set_is_told_by_its_name(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("a text")
    digest = hashlib.sha256(b"a text").hexdigest()
    assert names_of("org/name:train[:5]") == {"org/name:train[:5]": None}
    assert names_of(path) == names_of(str(path)) == names_of([path, path]) == {"x.txt": digest}
    assert names_of(["a text", "another"]) == {}


def test_a_run_says_nothing_unless_asked(train, capfd, monkeypatch, pictures):
    monkeypatch.setattr(logging, "_tqdm_active", True)  # the tests' environment switches bars off
    monkeypatch.setattr(logging.hf_hub_utils, "enable_progress_bars", lambda: None)  # so this would warn
    train()
    assert capfd.readouterr() == ("", "")
    assert logging.is_progress_bar_enabled()
    train(output_dir=train.folder.with_name("loud"), stages=["finetune"], progress=True)
    assert "finetune" in capfd.readouterr().err


@pytest.mark.parametrize(("stage", "step"), [("transfer", 1), ("transfer", 5), ("transfer", 9), ("finetune", 4)])
def test_a_resumed_run_equals_an_uninterrupted_one_exactly(
    stage, step, train, at_step, tiny_llama, layers, tmp_path, monkeypatch
):
    whole = train(lz.linearize(tiny_llama, layers), output_dir=tmp_path / "whole", checkpoint_every=2)
    with monkeypatch.context():
        at_step(stage, step, interrupt)
        with pytest.raises(Interrupted):
            train(lz.linearize(tiny_llama, layers), checkpoint_every=2)
        monkeypatch.undo()
    torch.manual_seed(123)  # a new process has other random numbers
    resumed = train(lz.linearize(tiny_llama, layers), checkpoint_every=2, resume=True)
    for name in ("transfer", "finetune"):
        assert train.log(name) == train.log(name, tmp_path / "whole")
    for (name, expected), found in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(expected, found), name
    left, expected = contents(train.folder), contents(tmp_path / "whole")
    for files in (left, expected):
        files.pop("training.json")  # seconds
    assert left == expected
    told = json.loads((train.folder / "training.json").read_text())
    went_on = {stage} if step > 1 else set()  # step 1 is before the first checkpoint
    assert told.keys() == {"transfer", "finetune"}
    assert {name for name, facts in told.items() if facts["seconds"] is None} == went_on


def test_a_run_interrupted_between_the_stages_goes_on_with_the_second(train, tiny_llama, layers, tmp_path, monkeypatch):
    whole = train(lz.linearize(tiny_llama, layers), output_dir=tmp_path / "whole")
    train(lz.linearize(tiny_llama, layers), stages=["transfer"])
    before = contents(train.folder / "transfer")
    resumed = train(lz.linearize(tiny_llama, layers), resume=True)
    assert contents(train.folder / "transfer") == before
    assert train.log("finetune") == train.log("finetune", tmp_path / "whole")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_the_second_stage_alone_goes_on_from_the_first_ones_model(train, tiny_llama, layers, tmp_path):
    whole = train(lz.linearize(tiny_llama, layers), output_dir=tmp_path / "whole")
    train(lz.linearize(tiny_llama, layers), stages=["transfer"])
    resumed = train(lz.linearize(tiny_llama, layers), stages=["finetune"], resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    first = train(lz.linearize(tiny_llama, layers), stages=["transfer"], resume=True)
    saved = lz.from_pretrained(train.folder / "transfer")
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), first.parameters(), strict=True))


def test_a_first_stage_cannot_be_added_after_the_second(train):
    train(stages=["finetune"])
    with pytest.raises(LizardzooError, match="a finished finetune without a transfer before it"):
        train(resume=True)


def test_a_finished_run_is_resumed_by_loading_it(train, student, tiny_llama, layers):
    train()
    before = contents(train.folder)
    again = train(lz.linearize(tiny_llama, layers), resume=True)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), again.parameters(), strict=True))
    assert contents(train.folder) == before


def test_resume_begins_where_there_is_nothing_yet(train):
    train(resume=True)
    assert len(train.log("finetune")) == 6


def test_an_incomplete_checkpoint_and_a_torn_log_line_are_left_out(tmp_path):
    for step, complete in ((2, True), (10, True), (12, False)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainable.safetensors").touch()
        if complete:
            (folder / "trainer_state.json").touch()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert last_checkpoint(tmp_path / "nowhere") is None
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_log(log) == [{"step": 1}, {"step": 2}]
    assert read_log(tmp_path / "nowhere") == []


def test_only_what_trains_and_only_two_checkpoints_are_kept(train, at_step, student):
    seen = {}

    def look(model):
        seen["folders"] = sorted(p.name for p in (train.folder / "checkpoints" / "transfer").iterdir())
        interrupt(model)

    at_step("transfer", 9, look)
    with pytest.raises(Interrupted):
        train(checkpoint_every=2)
    assert seen["folders"] == ["checkpoint-6", "checkpoint-8"]
    new = sum(p.numel() * 4 for n, p in student.named_parameters() if ".mixer." in n)
    saved = train.folder / "checkpoints" / "transfer" / "checkpoint-8" / "trainable.safetensors"
    assert new < saved.stat().st_size < new + 4096


def test_a_folder_that_is_not_empty_is_refused_before_anything_is_written(train, tmp_path):
    train.folder.mkdir()
    (train.folder / "precious.txt").write_text("keep me")
    before = contents(train.folder)
    with pytest.raises(
        LizardzooError, match=r"output_dir .*out is not empty; choose a new folder, or pass resume=True"
    ):
        train()
    with pytest.raises(LizardzooError, match=r"holds no recipe.json, so there is no run to resume"):
        train(resume=True)
    assert contents(train.folder) == before
    with pytest.raises(LizardzooError, match=r"precious.txt is a file"):
        train(output_dir=train.folder / "precious.txt")


def test_resuming_something_else_names_what_differs_and_changes_nothing(
    train, recipe, texts, tiny_llama, tiny_tokenizer, layers
):
    train(stages=["transfer"])
    before = contents(train.folder)
    tune = dataclasses.replace(recipe.finetune, steps=7)
    narrower = lz.linearize(tiny_llama, [dataclasses.replace(layers[0], window=4), *layers[1:]])
    moved = lz.linearize(tiny_llama, layers)
    with torch.no_grad():
        moved.model.norm.weight += 1
    for words, changes in (
        (r"recipe.finetune.steps \(6, now 7\)", {"recipe": dataclasses.replace(recipe, finetune=tune)}),
        (r"recipe.seed \(0, now 1\)", {"recipe": dataclasses.replace(recipe, seed=1)}),
        (r"data.transfer;", {"data": texts[:50]}),
        (r"model.layers;", {"model": narrower}),
        (r"model.weights;", {"model": moved}),
        (r"teacher;", {"teacher": tiny_llama}),
    ):
        changes.setdefault("model", lz.linearize(tiny_llama, layers))
        with pytest.raises(LizardzooError, match=f"out was started with another .*{words}"):
            train(changes.pop("model"), resume=True, **changes)
    assert contents(train.folder) == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"recipe": "lizzard"}, "unknown recipe 'lizzard'"),
        ({"stages": ["transfr"]}, r"stages=\['transfr'\]: expected a list of 'transfer' and 'finetune'"),
        ({"stages": "transfer"}, "stages='transfer'"),
        ({"stages": []}, r"stages=\[\]"),
        ({"data": ["short"]}, "fewer than one sequence of 48"),
        ({"data": "missing.txt"}, "missing.txt: there is no such file"),
        ({"micro_batch_size": 3}, "batch_size 4 cannot be split into micro batches of 3"),
        ({"micro_batch_size": 8}, "cannot be split into micro batches of 8"),
        ({"checkpoint_every": 0}, "checkpoint_every=0"),
    ],
)
def test_wrong_arguments_get_one_sentence_and_write_nothing(changes, words, train):
    with pytest.raises(LizardzooError, match=words) as error:
        train(**changes)
    assert "\n" not in str(error.value)
    assert not train.folder.exists()


def test_models_that_cannot_be_distilled_are_refused(train, tiny_llama):
    with pytest.raises(LizardzooError, match=r"a LlamaForCausalLM is not linearized; make a student with"):
        train(tiny_llama)
    with pytest.raises(LizardzooError, match="every layer keeps its softmax attention"):
        train(lz.linearize(tiny_llama, "softmax"))
    assert not train.folder.exists()


WITHOUT_PARAMETERS = [lz.Window(window=8, keep=2), lz.Heavy(window=8, keep=1, heavy=8)]


@pytest.mark.parametrize("spec", WITHOUT_PARAMETERS, ids=lambda spec: spec.type_name)
def test_mixers_without_parameters_go_straight_to_stage_2_and_it_is_said(spec, train, tiny_llama, capfd, pictures):
    bare = lz.linearize(tiny_llama, spec)
    for stages in (["transfer"], ["transfer", "finetune"]):
        with pytest.raises(LizardzooError, match=r'transfer has nothing to train; pass stages=\["finetune"\]'):
            train(bare, stages=stages)
    assert not train.folder.exists()
    train(bare, progress=True)
    said = "the mixers have no parameters of their own, so the stage transfer has nothing to train"
    assert f"{said}: it is left out\n" in capfd.readouterr().err
    assert json.loads((train.folder / "recipe.json").read_text())["left out"] == {"transfer": said}
    assert {path.name for path in train.folder.iterdir()} == {
        "final", "log.jsonl", "loss.png", "recipe.json", "training.json",
    }  # fmt: skip
    assert (len(train.log("transfer")), len(train.log("finetune"))) == (0, 6)
    quiet = train(lz.linearize(tiny_llama, spec), output_dir=train.folder.with_name("quiet"))
    assert capfd.readouterr() == ("", "")
    asked = train(lz.linearize(tiny_llama, spec), output_dir=train.folder.with_name("asked"), stages=["finetune"])
    for a, b, c in zip(bare.parameters(), quiet.parameters(), asked.parameters(), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("stages", [None, ["finetune"]])
def test_a_resumed_run_leaves_out_what_the_first_one_did(stages, train, at_step, tiny_llama, tmp_path, monkeypatch):
    spec = WITHOUT_PARAMETERS[1]
    whole = train(lz.linearize(tiny_llama, spec), output_dir=tmp_path / "whole", checkpoint_every=2)
    with monkeypatch.context():
        at_step("finetune", 4, interrupt)
        with pytest.raises(Interrupted):
            train(lz.linearize(tiny_llama, spec), checkpoint_every=2, stages=stages)
        monkeypatch.undo()
    resumed = train(lz.linearize(tiny_llama, spec), checkpoint_every=2, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    before, expected = contents(train.folder), contents(tmp_path / "whole")
    assert all(files.pop("training.json") for files in (before, expected))  # seconds, and times it was gone on with
    assert before == expected
    before = contents(train.folder)
    train(lz.linearize(tiny_llama, spec), resume=True)  # all is done
    assert contents(train.folder) == before


def test_one_layer_with_parameters_is_enough_for_both_stages(train, tiny_llama, layers):
    mixed = train(lz.linearize(tiny_llama, [WITHOUT_PARAMETERS[1], layers[0], WITHOUT_PARAMETERS[0]]))
    assert (len(train.log("transfer")), len(train.log("finetune"))) == (10, 6)
    errors = [entry["layer_error"] for entry in train.log("transfer")]
    assert all(entry.keys() == {"0", "1", "2"} for entry in errors)
    assert errors[-1]["1"] < 0.8 * errors[0]["1"]
    assert "left out" not in json.loads((train.folder / "recipe.json").read_text())
    assert (train.folder / "transfer").is_dir() and mixed.config.specs[1] == layers[0]


def test_a_teacher_with_another_vocabulary_is_refused(train, tiny_llama):
    tiny_llama.resize_token_embeddings(310)
    with pytest.raises(LizardzooError, match="the teacher has 310 words and the student 300"):
        train(teacher=tiny_llama)
    assert not train.folder.exists()


def test_a_teacher_may_be_a_folder(train, tiny_folder, recipe):
    train(teacher=tiny_folder, stages=["finetune"])
    assert train.log("finetune")[0]["kl"] > 0


def test_data_that_give_less_than_a_batch_are_refused(train, texts):
    with pytest.raises(LizardzooError, match=r"the data give 2 sequences of 48 tokens, fewer than one batch of 4"):
        train(data=texts[:1])
    assert not train.folder.exists()


def test_packed_data_may_be_given(train, texts, tiny_tokenizer, tmp_path):
    train(data=load_data(texts, tiny_tokenizer, 48), stages=["transfer"])
    expected = train.log("transfer")
    assert len(expected) == 10


def test_a_missing_package_is_named(train, monkeypatch):
    monkeypatch.setattr(run_module.importlib.util, "find_spec", lambda name: None if name == "peft" else True)
    with pytest.raises(LizardzooError, match=r"training needs the package peft; pip install 'lizardzoo\[train\]'"):
        train()
    assert importlib.util is run_module.importlib.util


def test_epochs_pass_over_the_data_and_shuffle_each_time(train, recipe, tiny_tokenizer, texts):
    stage = dataclasses.replace(recipe.transfer, steps=None, epochs=0.5)
    train(recipe=dataclasses.replace(recipe, transfer=stage), stages=["transfer"])
    sequences = len(load_data(texts, tiny_tokenizer, 48))
    assert len(train.log("transfer")) == -(-(sequences // 4) // 2)
