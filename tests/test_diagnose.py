"""Diagnosis: the numbers are those of literal formulas; each planted fault is named with its layer, health is not."""

import dataclasses
import io
import json
import math

import pytest
import torch
from rich.console import Console

import lizardzoo as lz
from lizardzoo.config import PRESETS
from lizardzoo.diagnose.verdict import LEAST_TEACHER_SHARE
from lizardzoo.errors import LizardzooError

WINDOW, KEEP, LENGTH = 8, 2, 48


@pytest.fixture
def text():
    return torch.randint(3, 300, (2, LENGTH))


def moved(model):
    """Parameters away from their starts, as after training."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mixer." in name:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        for mixer in model.mixers().values():
            if getattr(mixer, "log_scale", None) is not None:
                mixer.log_scale.bias.fill_(0.5)
    return model


@pytest.fixture
def student(tiny_llama):
    hybrid = lz.Hybrid(window=WINDOW, keep=KEEP)
    return moved(lz.linearize(tiny_llama, [hybrid, lz.Softmax(), hybrid]))


def kinds(found):
    return {(finding.kind, finding.layer, finding.part) for finding in found.findings}


# --- the numbers


def attention_of(teacher, ids, index):
    """Softmax weights [H, T, T] and the heads' outputs [T, H, D] of a layer, from the plain formulas, in float64."""
    caught = {}
    attention = teacher.model.layers[index].self_attn
    hooks = [
        attention.register_forward_pre_hook(lambda _, a, k: caught.update(k), with_kwargs=True),
        attention.o_proj.register_forward_pre_hook(lambda _, a: caught.update(out=a[0])),
    ]
    with torch.no_grad():
        teacher(ids[None])
        for hook in hooks:
            hook.remove()
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        x = caught["hidden_states"]
        q, k = (proj(x).view(1, LENGTH, -1, 16).transpose(1, 2) for proj in (attention.q_proj, attention.k_proj))
        q, k = apply_rotary_pos_emb(q, k, *caught["position_embeddings"])
        scores = (q[0] @ k[0].repeat_interleave(2, 0).transpose(1, 2)).double() / 4
    scores.masked_fill_(torch.ones(LENGTH, LENGTH).triu(1).bool(), -math.inf)
    return scores, caught["out"][0].view(LENGTH, 4, 16).double(), x


def test_the_numbers_are_those_of_the_plain_formulas(student, tiny_llama, text):
    found = lz.diagnose(student, text, teacher=tiny_llama)
    assert [layer.layer for layer in found.layers] == [0, 2]
    for layer in found.layers:
        mixer = student.mixers()[layer.layer]
        covered, sinks, targets, outputs, decays, linear = [], [], [], [], [], []
        for ids in text:
            scores, target, x = attention_of(tiny_llama, ids, layer.layer)
            i, t = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)[None]
            near = (t <= i) & ((t > i - WINDOW) | (t < KEEP))
            mass = lambda mask: torch.where(mask, scores.exp(), 0.0).sum(-1)  # noqa: B023, E731
            covered.append((mass(near) / mass(t <= i))[:, WINDOW + KEEP :])
            sinks.append((mass((t < KEEP) & (t <= i)) / mass(near))[:, WINDOW + KEEP :])
            targets.append(target)
            attention = student.model.layers[layer.layer].self_attn
            with torch.no_grad():
                cos, sin = student.model.rotary_emb(x, torch.arange(LENGTH)[None])
                inputs = attention.inputs(x, (cos, sin))
                outputs.append(mixer(inputs)[0][0].double())
                branches, _ = mixer.branches(inputs, None, False)
                both = [branches[name].log_mass.exp().double() for name in ("linear", "window")]
                linear.append((both[0] / (both[0] + both[1]))[0, WINDOW + KEEP :].T)
                decays.append(mixer.linear.gates(x)[0][0, WINDOW + KEEP :].double())
        target, output = torch.cat(targets), torch.cat(outputs)
        error = (output - target).square().mean((0, 2)) / target.var((0, 2), correction=0)
        assert layer.error == pytest.approx(error.tolist(), rel=1e-3)
        assert layer.teacher_shares["window"] == pytest.approx(torch.cat(covered, 1).mean(1).tolist(), rel=1e-4)
        assert layer.sink_mass == pytest.approx(torch.cat(sinks, 1).mean(1).tolist(), rel=1e-4)
        assert layer.shares["linear"] == pytest.approx(torch.cat(linear, 1).mean(1).tolist(), rel=1e-4)
        half_lives = math.log(0.5) / torch.cat(decays).mean(0)
        assert layer.half_life == {"linear.decay": pytest.approx(half_lives.tolist(), rel=1e-4)}
        for shares in (layer.shares, layer.teacher_shares):
            assert [sum(heads) for heads in zip(*shares.values())] == pytest.approx([1.0] * 4)


def test_sink_logits_count_as_sinks(tiny_llama, text):
    model = lz.linearize(tiny_llama, lz.Window(window=WINDOW, keep=0, sinks=3))
    with torch.no_grad():
        for mixer in model.mixers().values():
            mixer.window.sinks.logits.fill_(50.0)
    for layer in lz.diagnose(model, text).layers:
        assert layer.sink_mass == pytest.approx([1.0] * 4)
        assert layer.shares == {"window": [1.0] * 4}


def test_a_student_without_mixers_errors_is_its_teacher(tiny_llama, text):
    model = lz.linearize(tiny_llama, lz.Window(window=LENGTH - 1, keep=0))
    for layer in lz.diagnose(model, text, teacher=tiny_llama).layers:
        assert max(layer.error) < 1e-2  # one of 48 positions has lost one of 48 tokens
    exact = lz.diagnose(lz.linearize(tiny_llama, lz.Window(window=WINDOW)), text, teacher=tiny_llama)
    assert min(map(min, (layer.error for layer in exact.layers))) > 1e-2


def test_without_a_teacher_the_models_own_projections_are_one(student, tiny_llama, text):
    own, given = lz.diagnose(student, text), lz.diagnose(student, text, teacher=tiny_llama)
    for a, b in zip(own.layers, given.layers):
        assert a.error == pytest.approx(b.error, rel=1e-3)
        assert a.teacher_shares["linear"] == pytest.approx(b.teacher_shares["linear"], rel=1e-3)
    with torch.no_grad():
        student.model.layers[2].self_attn.v_proj.weight.mul_(2)  # as stage 2 changes projections
    assert lz.diagnose(student, text, teacher=tiny_llama).layers[1].error[0] > 2 * given.layers[1].error[0]


def test_the_model_is_left_as_it_was(student, tiny_llama, text):
    student.train()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    first, second = (lz.diagnose(student, text, teacher=tiny_llama) for _ in range(2))
    assert first == second
    assert student.training
    assert not tiny_llama.training
    assert not any(a.runs_softmax for a in student.attentions() if a.mixer is not None)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert all(not a._forward_pre_hooks for m in (student, tiny_llama) for a in (x.self_attn for x in m.model.layers))


# --- verdicts


@pytest.mark.parametrize("preset", ["recommended", "hybrid", "lolcats", "lizard-rope", "window", "gated-linear"])
def test_a_healthy_model_gets_no_finding(tiny_llama, text, preset):
    spec = PRESETS.get(preset)
    changes = {name: WINDOW for name in ("window", "heavy") if hasattr(spec, name)}
    if preset == "lizard-rope":
        changes["gate_init"] = 0.99  # the paper's own start is what the next law finds
    model = moved(lz.linearize(tiny_llama, dataclasses.replace(spec, **changes)))
    found = lz.diagnose(model, text, teacher=tiny_llama)
    assert found.findings == []
    assert found.verdict == "nothing is wrong"


@pytest.mark.parametrize("layer", [0, 2])
@torch.no_grad()
def test_a_dead_gate_is_named(student, text, layer):
    student.mixers()[layer].linear.decay.bias[1] = -3.0
    found = lz.diagnose(student, text)
    assert ("dead gate", layer, "linear.decay") in kinds(found)
    assert {entry for entry in kinds(found) if entry[0] == "dead gate"} == {("dead gate", layer, "linear.decay")}
    assert f"layer {layer}: the gate linear.decay is dead: head 1 of 2" in found.verdict


def test_the_papers_gate_start_is_dead(tiny_llama, text):
    found = lz.diagnose(lz.linearize(tiny_llama, dataclasses.replace(PRESETS.get("lizard"), window=WINDOW)), text)
    assert {entry[1] for entry in kinds(found) if entry[0] == "dead gate"} == {0, 1, 2}
    assert found.layers[0].half_life["linear.decay"] == [pytest.approx(1.0)]


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize(("branch", "log_scale"), [("linear", -12.0), ("window", 20.0)])
@torch.no_grad()
def test_a_bypassed_branch_is_named(student, text, layer, branch, log_scale):
    student.mixers()[layer].log_scale.bias.fill_(log_scale)
    found = lz.diagnose(student, text)
    assert {entry for entry in kinds(found) if entry[0] == "bypassed branch"} == {("bypassed branch", layer, branch)}
    assert f"layer {layer}: the branch {branch} is bypassed: it carries 0.0" in found.verdict


@torch.no_grad()
def test_a_bypassed_branch_of_a_sum_is_named(tiny_llama, text):
    spec = dataclasses.replace(PRESETS.get("lizard-rope"), window=WINDOW, gate_init=0.99)
    model = moved(lz.linearize(tiny_llama, spec))
    model.mixers()[1].alpha.fill_(1e-4)
    assert kinds(lz.diagnose(model, text)) == {("bypassed branch", 1, "window")}


@torch.no_grad()
def test_a_branch_that_the_teacher_has_no_use_for_is_not_missed(student, text):
    """Its keys attend to nothing but the last token: there is no mass beyond the window to carry."""
    attention = student.model.layers[2].self_attn
    found = lz.diagnose(student, text)
    assert found.layers[1].teacher_shares["linear"][0] > LEAST_TEACHER_SHARE
    student.mixers()[2].log_scale.bias.fill_(-12.0)
    assert ("bypassed branch", 2, "linear") in kinds(lz.diagnose(student, text))
    attention.q_proj.weight.mul_(0)
    attention.k_proj.weight.mul_(0)
    uniform = lz.diagnose(student, text).layers[1].teacher_shares["linear"]
    positions = torch.arange(WINDOW + KEEP, LENGTH)
    assert uniform == pytest.approx([(1 - (WINDOW + KEEP) / (positions + 1)).mean().item()] * 4, rel=1e-4)


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("name", ["log_scale.weight", "linear.feature_map.key", "linear.decay.bias"])
@torch.no_grad()
def test_a_frozen_parameter_is_named(student, text, layer, name):
    mixer = student.mixers()[layer]
    start = dict(mixer.spec.build(mixer.shape).named_parameters())
    dict(mixer.named_parameters())[name].copy_(start[name])
    found = lz.diagnose(student, text)
    assert kinds(found) == {("frozen parameter", layer, name)}
    assert found.frozen == {index: [name] if index == layer else [] for index in (0, 2)}
    assert f"layer {layer}: the parameter {name} has not moved" in found.verdict


def test_an_untrained_model_is_called_so(tiny_llama, text):
    spec = lz.Hybrid(window=WINDOW)
    calibrated = lz.linearize(tiny_llama, spec, calibrate=text)
    assert ("untrained", None, None) in kinds(lz.diagnose(lz.linearize(tiny_llama, spec), text))
    found = lz.diagnose(calibrated, text)  # its log-scale's start is not the spec's
    assert found.frozen[0] is not None
    assert "layer 0: the parameter log_scale.weight has not moved from its start" in found.verdict
    assert "(and layers 1, 2)" in found.verdict
    found = lz.diagnose(calibrated, text, start=lz.linearize(tiny_llama, spec, calibrate=text))
    assert found.frozen == {0: None, 1: None, 2: None}
    assert ("untrained", None, None) in kinds(found)


@torch.no_grad()
def test_outputs_that_are_wrong_altogether_are_named(student, text):
    student.mixers()[0].log_scale.bias[3] = math.nan
    found = lz.diagnose(student, text)
    assert ("not finite", 0, None) in kinds(found)
    assert "layer 0: the output of head 3 is not finite" in found.verdict
    mixer = student.mixers()[0]
    mixer.log_scale.bias.fill_(0.5)
    mixer.output = lambda branches, inputs: -3 * branches["window"].y
    assert kinds(lz.diagnose(student, text)) == {("worse than a constant", 0, None)}


# --- answers


@pytest.fixture
def questions(tmp_path):
    """Sixteen questions whose answers are spread over the letters."""
    path = tmp_path / "questions.jsonl"
    rows = [{"query": f"{i} + {i}?\nAnswer:", "choices": ["A", "B", "C", "D"], "gold": i % 4} for i in range(16)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@torch.no_grad()
def test_a_collapse_to_one_letter_is_named(student, tiny_llama, tiny_tokenizer, text, questions):
    def ask(**changes):
        return lz.diagnose(student, text, teacher=tiny_llama, questions=questions, tokenizer=tiny_tokenizer, **changes)

    blank = tiny_tokenizer("Answer: ")["input_ids"]
    letters = {letter: tiny_tokenizer(f"Answer: {letter}")["input_ids"][len(blank)] for letter in "ABCD"}
    found = ask(few_shot=2)
    counts = found.letters.model
    assert sum(counts.values()) == found.letters.questions == 16
    assert found.letters.right == dict.fromkeys("ABCD", 4)
    expected = dict.fromkeys("ABCD", 0)
    from lizardzoo.evaluate.questions import prompts, read_questions

    rows = read_questions(questions)
    for (prompt,) in prompts(rows, 2):
        logits = student(tiny_tokenizer(f"{prompt} ", return_tensors="pt")["input_ids"]).logits[0, -1]
        expected[max(letters, key=lambda letter: logits[letters[letter]])] += 1
    assert counts == expected
    assert sum(found.letters.teacher.values()) == 16

    class Biased(torch.nn.Linear):
        def forward(self, hidden):
            logits = super().forward(hidden)
            logits[..., letters["C"]] = logits.max() + 1
            return logits

    student.lm_head.__class__ = Biased
    found = ask(limit=12)
    assert found.letters.model == {"A": 0, "B": 0, "C": 12, "D": 0}
    assert ("letter collapse", None, "C") in kinds(found)
    right = sum(i * 16 // 12 % 4 == 2 for i in range(12))
    assert f"12 of 12 questions are answered with C, which is right {right} times; the teacher says it" in found.verdict
    assert ("letter collapse", None, "C") not in kinds(ask(limit=4))  # too few to tell


# --- form


def test_a_diagnosis_shows_its_numbers_and_survives_json(student, text, tmp_path):
    found = lz.diagnose(student, text)
    values = json.loads(found.to_json())
    assert values == found.to_dict()
    assert values["layers"][1]["layer"] == 2
    console = Console(width=150, record=True, file=io.StringIO())
    console.print(found.table())
    shown = console.export_text()
    for layer in found.layers:
        assert f"{sum(layer.error) / 4:.4f}" in shown
        assert f"{sum(layer.shares['linear']) / 4:.1%}" in shown
    assert found.plot(tmp_path / "new" / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_progress_counts_the_sequences(student, text):
    calls = []
    lz.diagnose(student, text, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 2), (2, 2)]


def test_wrong_input_gets_one_sentence(student, tiny_llama, tiny_tokenizer, text, questions, tmp_path):
    with pytest.raises(LizardzooError, match="LlamaForCausalLM has no mixer to look at"):
        lz.diagnose(tiny_llama, text)
    with pytest.raises(LizardzooError, match="10 tokens, but the widest window covers 10"):
        lz.diagnose(student, text[:, :10])
    with pytest.raises(LizardzooError, match=r"token ids \[N, T\], got list"):
        lz.diagnose(student, [[1, 2]])
    with pytest.raises(LizardzooError, match="needs a tokenizer"):
        lz.diagnose(student, text, questions=questions)
    (tmp_path / "other.jsonl").write_text('{"query": "Q", "choices": ["a", "b"], "gold": 0}\n' * 2)
    with questions.open("a") as file:
        file.write('{"query": "Q", "choices": ["a", "b"], "gold": 0}\n')
    with pytest.raises(LizardzooError, match=r"answered with \['A', 'B', 'C', 'D'\] and with \['a', 'b'\]"):
        lz.diagnose(student, text, questions=questions, tokenizer=tiny_tokenizer)
    other = lz.linearize(tiny_llama, "window")
    with pytest.raises(LizardzooError, match="mixers in other layers"):
        lz.diagnose(student, text, start=other)
    hybrid = lz.Hybrid(window=WINDOW, log_scale=None)
    with pytest.raises(LizardzooError, match="layer 0 has other parameters"):
        lz.diagnose(student, text, start=lz.linearize(tiny_llama, [hybrid, lz.Softmax(), hybrid]))
    tiny_llama.config.num_attention_heads = 8
    with pytest.raises(LizardzooError, match="num_attention_heads is 8 and the student's 4"):
        lz.diagnose(student, text, teacher=tiny_llama)
