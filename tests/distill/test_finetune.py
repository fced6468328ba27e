"""Stage 2: the sliced loss is the plain one, the base is its own teacher, merging leaves a plain model."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, LoraModel
from peft.tuners.lora import LoraLayer
from torch import nn

import lizardzoo as lz
from lizardzoo.adapters.base import is_new_parameter
from lizardzoo.distill import finetune as stage_2
from lizardzoo.distill.finetune import FinetuneTrainer, last_hidden_states, logit_losses, next_tokens
from lizardzoo.distill.lora import merge_lora
from lizardzoo.distill.trainer import NonFiniteError
from lizardzoo.errors import LizardzooError


@pytest.mark.parametrize("size", [1, 5, 14, None])
@pytest.mark.parametrize(("ce_weight", "kl_weight"), [(1.0, 0.0), (0.0, 1.0), (0.3, 0.7)])
def test_the_sliced_losses_and_their_gradient_are_those_of_whole_logits(size, ce_weight, kl_weight):
    head, teacher_head = nn.Linear(6, 11, bias=False).double(), nn.Linear(4, 11, bias=False).double()
    hidden = torch.randn(2, 7, 6, dtype=torch.float64, requires_grad=True)
    teacher_hidden = torch.randn(2, 7, 4, dtype=torch.float64)
    labels = torch.randint(11, (2, 7))
    labels[:, -1] = -100
    loss, cross_entropy, kl = logit_losses(
        hidden,
        head,
        labels,
        (teacher_hidden, teacher_head),
        ce_weight=ce_weight,
        kl_weight=kl_weight,
        size=size,
    )
    log_p, log_t = head(hidden).log_softmax(-1), teacher_head(teacher_hidden).log_softmax(-1)
    plain_ce = F.cross_entropy(head(hidden).flatten(0, 1), labels.flatten())
    plain_kl = (log_t.exp() * (log_t - log_p)).sum(-1).mean()
    plain = ce_weight * plain_ce + kl_weight * plain_kl
    close = {"rel": 1e-5}  # log-softmax is fp32 whatever the model's dtype
    assert cross_entropy.item() == pytest.approx(plain_ce.item(), **close)
    assert kl.item() == pytest.approx(plain_kl.item(), **close)
    assert loss.item() == pytest.approx(plain.item(), **close)
    (found,) = torch.autograd.grad(3 * loss, hidden)
    (expected,) = torch.autograd.grad(3 * plain, hidden)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_without_a_teacher_there_is_cross_entropy_alone():
    head, hidden = nn.Linear(6, 11, bias=False), torch.randn(1, 4, 6)
    labels = torch.tensor([[1, 2, 3, -100]])
    loss, cross_entropy, kl = logit_losses(hidden, head, labels, ce_weight=2.0, kl_weight=0.0)
    assert loss.item() == pytest.approx(2 * cross_entropy.item())
    assert kl.item() == 0


def test_equal_logits_have_no_kl_and_no_gradient():
    head = nn.Linear(6, 11, bias=False)
    hidden = torch.randn(1, 4, 6, requires_grad=True)
    loss, _, kl = logit_losses(
        hidden, head, torch.full((1, 4), -100), (hidden.detach(), head), ce_weight=1.0, kl_weight=1.0
    )
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert abs(kl.item()) < 1e-7
    assert gradient.abs().max() < 1e-6


def test_no_token_predicts_across_documents():
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    assert next_tokens(ids).tolist() == [[6, 7, 8, 9, -100]]
    assert next_tokens(ids, torch.tensor([[0, 1, 2, 0, 1]])).tolist() == [[6, 7, -100, 9, -100]]


def test_hidden_states_and_head_make_the_logits(student, batch):
    with torch.no_grad():
        hidden = last_hidden_states(student, student, {"input_ids": batch})
        assert torch.equal(student.get_output_embeddings()(hidden), student(batch, use_cache=False).logits)


def with_random_lora(student):
    lora = LoraModel(student, LoraConfig(r=2, target_modules=["q_proj", "o_proj"]), "default")
    for name, parameter in student.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    return lora


def test_its_own_base_is_the_teacher_bit_for_bit_and_comes_back_as_the_student(student, tiny_llama, batch):
    trainer = FinetuneTrainer.__new__(FinetuneTrainer)
    trainer.model, trainer.lora, trainer.teacher = student, with_random_lora(student), None
    with torch.no_grad():
        before = student(batch).logits
        hidden, head = trainer.teacher_states({"input_ids": batch})
        assert torch.equal(head(hidden), tiny_llama(batch).logits)
        assert torch.equal(student(batch).logits, before)
        trainer.teacher = tiny_llama
        explicit, head = trainer.teacher_states({"input_ids": batch})
        assert torch.equal(explicit, hidden)
        assert head is tiny_llama.lm_head
    assert all(parameter.requires_grad for name, parameter in student.named_parameters() if "lora_" in name)


def test_kl_to_its_own_base_trains_as_kl_to_the_teacher_does(train, tiny_llama, layers, tmp_path):
    train(stages=["finetune"])
    other = lz.linearize(tiny_llama, layers)
    train(other, stages=["finetune"], teacher=tiny_llama, output_dir=tmp_path / "other")
    expected, found = train.log("finetune"), train.log("finetune", tmp_path / "other")
    assert len(expected) == 6
    for ours, theirs in zip(expected, found, strict=True):
        assert ours["kl"] == theirs["kl"]
        assert ours["loss"] == pytest.approx(ours["kl"], rel=1e-5)


def kl_on(batch, student, teacher):
    with torch.no_grad():
        log_p, log_t = (model(batch, use_cache=False).logits.log_softmax(-1) for model in (student, teacher))
    return (log_t.exp() * (log_t - log_p)).sum(-1).mean().item()


def test_stage_2_brings_the_student_closer_to_its_teacher_and_merges_to_a_plain_model(
    train, student, tiny_llama, recipe, batch, monkeypatch
):
    seen = {}

    def merge(model):
        with torch.no_grad():
            seen["logits"] = student(batch).logits
        return merge_lora(model)

    monkeypatch.setattr(stage_2, "merge_lora", merge)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    first = kl_on(batch, student, tiny_llama)
    flags = [parameter.requires_grad for parameter in student.parameters()]
    tune = dataclasses.replace(recipe.finetune, steps=20, lora_targets=("q_proj", "v_proj"))
    assert train(recipe=dataclasses.replace(recipe, finetune=tune), stages=["finetune"]) is student

    assert kl_on(batch, student, tiny_llama) < 0.8 * first
    with torch.no_grad():
        torch.testing.assert_close(student(batch).logits, seen["logits"], atol=1e-5, rtol=1e-5)
    assert not any(isinstance(module, LoraLayer) for module in student.modules())
    assert not hasattr(student, "peft_config")
    after = student.state_dict()
    assert list(after) == list(before)
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    expected = {name for name in before if is_new_parameter(name)}
    expected |= {name for name in before if name.endswith(("q_proj.weight", "v_proj.weight"))}
    assert moved == expected
    assert all(value.dtype == torch.float32 for value in after.values())
    assert [parameter.requires_grad for parameter in student.parameters()] == flags
    assert not student.training
    assert student.config.use_cache


def test_the_merge_is_pefts_up_to_rounding(student):
    expected = copy.deepcopy(student)
    for model in (student, expected):
        torch.manual_seed(3)
        lora = with_random_lora(model)
        if model is expected:
            lora.merge_and_unload()
        else:
            updates = merge_lora(model)
            lora.unload()
    assert updates.keys() == {
        name for name in student.state_dict() if name.endswith(("q_proj.weight", "o_proj.weight"))
    }
    torch.testing.assert_close(student.state_dict(), expected.state_dict(), atol=1e-5, rtol=1e-5)


def test_cross_entropy_alone_needs_no_teacher(train, recipe):
    tune = dataclasses.replace(recipe.finetune, ce_weight=1.0, kl_weight=0.0)
    train(recipe=dataclasses.replace(recipe, finetune=tune), stages=["finetune"])
    log = train.log("finetune")
    assert "kl" not in log[0]
    assert log[-1]["cross_entropy"] < log[0]["cross_entropy"]
    assert log[0]["loss"] == pytest.approx(log[0]["cross_entropy"])


@pytest.mark.parametrize("saver", [{"gradient_checkpointing": True}, {"micro_batch_size": 2}], ids=str)
def test_what_saves_memory_changes_no_loss(saver, train, tiny_llama, layers, tmp_path):
    train(stages=["finetune"])
    other = lz.linearize(tiny_llama, layers)
    train(other, stages=["finetune"], output_dir=tmp_path / "other", **saver)
    expected = [entry["loss"] for entry in train.log("finetune")]
    found = [entry["loss"] for entry in train.log("finetune", tmp_path / "other")]
    assert found == pytest.approx(expected, rel=1e-4)


def test_packed_documents_are_isolated(train, recipe):
    train(recipe=dataclasses.replace(recipe, isolate_documents=True), stages=["finetune"])
    assert len(train.log("finetune")) == 6


def test_an_unknown_lora_target_lists_what_exists(train, recipe):
    for target in ("query", "lm_head"):
        tune = dataclasses.replace(recipe.finetune, lora_targets=("q_proj", target))
        with pytest.raises(LizardzooError, match=f"lora_targets names '{target}'.*down_proj.*k_proj.*q_proj"):
            train(recipe=dataclasses.replace(recipe, finetune=tune))
    assert not train.folder.exists()


def test_a_non_finite_loss_names_the_layer_and_takes_lora_out_again(train, at_step, student):
    before = {n: p.clone() for n, p in student.state_dict().items() if not is_new_parameter(n)}

    def poison(model):
        model.model.layers[1].self_attn.v_proj.lora_B["default"].weight.data.fill_(float("inf"))

    at_step("finetune", 3, poison)
    with pytest.raises(
        NonFiniteError,
        match=r"finetune, step 4: the loss is not finite, first in the output of layer 1; "
        r"the last good checkpoint is .*checkpoint-3",
    ):
        train(stages=["finetune"])
    assert len(train.log("finetune")) == 3
    assert not (train.folder / "final").exists()
    after = student.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not any(isinstance(module, LoraLayer) for module in student.modules())
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_a_non_finite_teacher_is_told_from_a_non_finite_student(train, tiny_llama):
    tiny_llama.lm_head.weight = nn.Parameter(tiny_llama.lm_head.weight * float("nan"))
    with pytest.raises(NonFiniteError, match="step 1: the loss is not finite, though every layer's output is"):
        train(stages=["finetune"], teacher=tiny_llama)
