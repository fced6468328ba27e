"""Teacher to student and back from disk: exact where it must be, strict about every key, harmless to the teacher."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import lizardzoo as lz
from lizardzoo import LizardzooError
from lizardzoo.adapters import is_new_parameter
from lizardzoo.adapters.masks import CACHE_KEYWORD
from lizardzoo.mixers import AttentionShape
from tests.adapters.students import LAYERS, distance, student, tokens


@pytest.mark.parametrize("layers", [lz.Hybrid(window=16), lz.Window(window=16, keep=0), lz.Hybrid(window=16, sinks=0)])
def test_a_prompt_within_the_window_is_answered_as_by_the_teacher(tiny_llama: Any, layers: Any) -> None:
    ids = tokens(2, 40)
    model = lz.linearize(tiny_llama, layers)
    assert distance(model(ids[:, :16]).logits, tiny_llama(ids[:, :16]).logits) < 1e-5
    assert distance(model(ids).logits, tiny_llama(ids).logits) > 1e-3  # and beyond it there is something to learn


def test_a_folder_is_converted_like_a_model(tiny_folder: Path, tiny_llama: Any) -> None:
    ids = tokens(1, 30)
    from_folder = lz.linearize(tiny_folder, LAYERS["mixed"])
    assert torch.equal(from_folder(ids).logits, lz.linearize(tiny_llama, LAYERS["mixed"])(ids).logits)
    narrow = lz.linearize(tiny_folder, "hybrid", dtype=torch.bfloat16)
    dtypes = {is_new_parameter(name): p.dtype for name, p in narrow.named_parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}


def test_a_bf16_checkpoint_keeps_its_new_parameters_in_fp32(tiny_llama: Any, tmp_path: Path) -> None:
    model = student(tiny_llama, LAYERS["mixed"]).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    again = lz.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for (name, p), q in zip(model.named_parameters(), again.parameters()):
        assert p.dtype == q.dtype == (torch.float32 if is_new_parameter(name) else torch.bfloat16)
        assert torch.equal(p, q)
    assert again(tokens(1, 20)).logits.dtype == torch.bfloat16


def test_another_window_needs_no_new_weights(tiny_llama: Any, tmp_path: Path) -> None:
    ids = tokens(1, 60)
    model = student(tiny_llama, [lz.Hybrid(window=4), lz.Softmax(), lz.Window(window=4)])
    narrow = model(ids).logits
    model.set_window(20)
    assert [getattr(spec, "window", None) for spec in model.config.specs] == [20, None, 20]
    wide = model(ids).logits
    assert distance(wide, narrow) > 1e-4
    model.save_pretrained(tmp_path)
    assert torch.equal(lz.from_pretrained(tmp_path)(ids).logits, wide)
    model.set_window([60, 60])
    plain = lz.linearize(tiny_llama, [lz.Hybrid(window=60), lz.Softmax(), lz.Window(window=60)])
    assert distance(model(ids).logits, plain(ids).logits) < 1e-5
    assert [getattr(spec, "window", None) for spec in model.config.specs] == [60, None, 60]


def test_more_heavy_tokens_need_no_new_weights(tiny_llama: Any, tmp_path: Path) -> None:
    ids = tokens(1, 60)
    few, many = ([lz.Heavy(window=4, heavy=n), lz.Hybrid(window=4), lz.Heavy(window=8, heavy=n)] for n in (4, 20))
    model = student(tiny_llama, few)
    before = model(ids).logits
    model.set_heavy(20)
    assert model.config.specs == many
    after = model(ids).logits
    assert distance(after, before) > 1e-4
    assert torch.equal(after, student(tiny_llama, many)(ids).logits)
    model.save_pretrained(tmp_path)
    assert torch.equal(lz.from_pretrained(tmp_path)(ids).logits, after)
    cache = model(ids[:, :40])[CACHE_KEYWORD]
    steps = [model(token, **{CACHE_KEYWORD: cache}).logits for token in ids[:, 40:].split(1, dim=1)]
    assert distance(torch.cat(steps, 1), after[:, 40:]) < 1e-5


@pytest.mark.parametrize(
    ("field", "name", "layers", "without"),
    [
        ("window", "a window", [lz.Hybrid(window=4), lz.Softmax(), lz.Window(window=4)], "gated-linear"),
        ("heavy", "heavy tokens", [lz.Heavy(heavy=4), lz.Hybrid(), lz.Heavy(heavy=4)], "hybrid"),
    ],
)
def test_a_size_that_cannot_be_changes_nothing(
    tiny_llama: Any, field: str, name: str, layers: Any, without: str
) -> None:
    model = student(tiny_llama, layers)
    change = getattr(model, f"set_{field}")
    with pytest.raises(LizardzooError, match=f"2 layers with {name}, got 3 numbers"):
        change([1, 2, 3])
    for wrong in (1.5, None, "8", torch.tensor(8), [4, 0], [4, 1.5]):
        with pytest.raises(LizardzooError, match=field):
            change(wrong)
    assert model.config.specs == layers
    with pytest.raises(LizardzooError, match=rf"set_{field}\(8\): no layer of this model has {name}"):
        getattr(lz.linearize(tiny_llama, without), f"set_{field}")(8)


def test_calibration_brings_each_layer_closer_to_the_teacher(tiny_llama: Any) -> None:
    ids = tokens(2, 60)
    constant, calibrated = (lz.linearize(tiny_llama, lz.Hybrid(window=8), calibrate=c) for c in (None, ids))
    errors = []
    for model in (constant, calibrated):
        found: list[torch.Tensor] = []

        def compare(attention: Any, args: Any, kwargs: Any, output: Any, found: list[torch.Tensor] = found) -> None:
            q, k, v = attention.project(kwargs["hidden_states"])
            found.append(_head_error(attention, kwargs, q, k, v))

        handles = [a.register_forward_hook(compare, with_kwargs=True) for a in model.attentions()]
        with torch.no_grad(), lz.softmax_mode(model):
            model(ids, use_cache=False)
        for handle in handles:
            handle.remove()
        errors.append(torch.stack(found))
    assert (errors[1] <= errors[0] * 1.0001).all() and (errors[1] < errors[0] * 0.99).any()


def _head_error(attention: Any, kwargs: Any, q: Any, k: Any, v: Any) -> torch.Tensor:
    """Squared distance of each head's output from softmax attention's, by brute force."""
    inputs = attention.inputs(**kwargs)
    rotated_q, rotated_k = inputs.rotated()
    scores = torch.einsum("bihd,bthd->bhit", rotated_q, rotated_k.repeat_interleave(2, 2)) * attention.scaling
    scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), float("-inf"))
    target = torch.einsum("bhit,bthd->bihd", scores.softmax(-1), v.repeat_interleave(2, 2))
    return (attention.mixer(inputs)[0] - target).square().sum((0, 1, 3))


@pytest.mark.parametrize(("spec", "runs"), [(lz.Heavy(), 0), (lz.Window(sinks=2), 0), (lz.Hybrid(window=8), 1)])
def test_calibration_runs_the_teacher_only_for_mixers_that_set_something(tiny_llama, spec, runs, monkeypatch):
    lengths, forward = [], LlamaForCausalLM.forward

    def counted(self, *args, **kwargs):
        lengths.append(args[0].shape[1])
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", counted)
    lz.linearize(tiny_llama, [spec, lz.Heavy(), "softmax"], calibrate=torch.randint(3, 300, (1, 40)))
    assert lengths == [40] * runs


def test_calibration_takes_text_with_a_tokenizer(tiny_folder: Path, tiny_llama: Any) -> None:
    text = "gates and windows and all that is far away " * 20
    model = lz.linearize(tiny_folder, lz.Hybrid(window=8), calibrate=text)
    start = lz.linearize(tiny_llama, lz.Hybrid(window=8))
    assert any(
        not torch.equal(a.log_scale.bias, b.log_scale.bias)
        for a, b in zip(model.mixers().values(), start.mixers().values())
    )
    with pytest.raises(LizardzooError, match="needs a tokenizer"):
        lz.linearize(tiny_llama, lz.Hybrid(window=8), calibrate=text)
    with pytest.raises(LizardzooError, match="no sequence longer than window"):
        lz.linearize(tiny_folder, lz.Hybrid(window=2000), calibrate=text)
    with pytest.raises(LizardzooError, match="calibration text is empty"):
        lz.linearize(tiny_folder, lz.Hybrid(window=8), calibrate="")


def test_what_cannot_be_converted_is_refused(tiny_llama: Any, tmp_path: Path) -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=20))
    with pytest.raises(LizardzooError, match="cannot linearize a 'gpt2' model; supported architectures: llama"):
        lz.linearize(gpt2)
    with pytest.raises(LizardzooError, match="has 2 entries but the model has 3 layers"):
        lz.linearize(tiny_llama, ["softmax", "window"])
    with pytest.raises(LizardzooError, match="unknown preset 'lizzard'; there are: "):
        lz.linearize(tiny_llama, "lizzard")
    with pytest.raises(LizardzooError, match="linearized already"):
        lz.linearize(lz.linearize(tiny_llama))
    odd = LlamaForCausalLM(LlamaConfig(hidden_size=24, num_attention_heads=4, num_key_value_heads=3, head_dim=6,
                                       num_hidden_layers=1, intermediate_size=8, vocab_size=20))  # fmt: skip
    with pytest.raises(LizardzooError, match="4 query heads and 3 key heads"):
        lz.linearize(odd)
    with pytest.raises(LizardzooError, match="head_dim 5"):  # newer transformers refuse such a config themselves
        AttentionShape(hidden_size=24, heads=4, kv_heads=4, head_dim=5, scale=1.0)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks by the old name
def test_what_is_no_causal_lm_is_refused(tiny_llama: Any) -> None:
    lora = PeftModel(copy.deepcopy(tiny_llama), LoraConfig(target_modules=["q_proj"]))
    for what, name in ((tiny_llama.model, "LlamaModel"), (lora, "PeftModel")):
        with pytest.raises(
            LizardzooError, match=rf"this {name} are not those of a 'llama' causal LM.*merge_and_unload"
        ):
            lz.linearize(what)
    for nothing in (None, 7, torch.nn.Linear(2, 2)):
        with pytest.raises(LizardzooError, match=rf"got a {type(nothing).__name__}; load it with AutoModelForCausalLM"):
            lz.linearize(nothing)


def test_a_checkpoint_with_other_keys_is_refused(tiny_llama: Any, tiny_folder: Path, tmp_path: Path) -> None:
    student(tiny_llama, LAYERS["hybrid"]).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    gone = "model.layers.1.self_attn.mixer.linear.decay.bias"
    for broken, words in (
        ({n: w for n, w in weights.items() if n != gone}, f"1 missing .*{gone}"),
        ({**weights, "model.layers.0.extra": torch.zeros(2)}, "1 unexpected .*model.layers.0.extra"),
    ):
        save_file(broken, file, metadata={"format": "pt"})
        with pytest.raises(LizardzooError, match=words):
            lz.from_pretrained(tmp_path)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(LizardzooError, match="damaged or cut short"):
        lz.from_pretrained(tmp_path)
    with pytest.raises(LizardzooError, match=r"plain 'llama' model.*lizardzoo\.linearize"):
        lz.from_pretrained(tiny_folder)


def test_layers_survive_the_config_exactly(tiny_llama: Any, tmp_path: Path) -> None:
    config = lz.linearize(tiny_llama, LAYERS["mixed"]).config
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.model_type == "lizard_llama" and again.layers == config.layers
    assert again.layer_types == ["lizardzoo_mixer", "full_attention", "lizardzoo_mixer"]
    changed = AutoConfig.from_pretrained(tmp_path, layers=["softmax"] * 3)
    assert changed.layer_types == ["full_attention"] * 3  # derived, never stale


def test_the_same_laws_on_a_real_model(smollm2: Any) -> None:
    """Bit for bit with softmax everywhere; within 1e-4 of logits of about 20 up to the window, untrained."""
    teacher, tokenizer = smollm2
    ids = tokenizer(Path(__file__).read_text(), return_tensors="pt")["input_ids"][:, :300]
    with torch.no_grad():
        expected = teacher(ids).logits
        assert torch.equal(lz.linearize(teacher, "softmax")(ids).logits, expected)
        for preset, within in (("recommended", 260), ("hybrid", 128)):
            model = lz.linearize(teacher, preset)
            assert model.config.specs[0].exact_within == within
            error = (model(ids).logits - expected).abs().amax((0, 2))
            assert error[:within].max() <= 1e-4
            assert error[within:].max() > 1e-2  # and beyond it a student is no teacher
