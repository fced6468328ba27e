"""Evaluation: equal to the plain formulas, on every cut, and nothing of the model is changed by it."""

import copy
import gzip
import io
import itertools
import json
import math
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import lizardzoo as lz
from lizardzoo import evaluate
from lizardzoo.adapters.masks import CACHE_KEYWORD
from lizardzoo.cache import cache_bytes, kv_bytes, state_bytes
from lizardzoo.errors import LizardzooError
from lizardzoo.evaluate import positions

LENGTH = 48
WINDOW = 8


@pytest.fixture
def text() -> torch.Tensor:
    return torch.randint(3, 300, (3, LENGTH))


@pytest.fixture
def student(tiny_llama):
    """A hybrid whose linear branch matters, with one softmax layer kept."""
    layers = [lz.Hybrid(window=WINDOW, keep=2), lz.Softmax(), lz.Hybrid(window=WINDOW, keep=2)]
    model = lz.linearize(tiny_llama, layers)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mixer." in name:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def logits_of(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def plain(model, teacher, ids):
    """Negative log-likelihood and KL of every prediction [N, T - 1], in float64, from the full logits."""
    student, expected = (logits_of(m, ids)[:, :-1].double().log_softmax(-1) for m in (model, teacher))
    nll = -student.gather(-1, ids[:, 1:, None]).squeeze(-1)
    return nll, torch.nn.functional.kl_div(student, expected, log_target=True, reduction="none").sum(-1)


# --- by position


def test_perplexity_and_kl_are_those_of_the_full_logits(student, tiny_llama, text):
    nll, kl = plain(student, tiny_llama, text)
    found = evaluate.by_position(student, text, teacher=tiny_llama, buckets=[5, 20])
    for bucket in [*found.buckets, found.overall, *found.curve]:
        part = slice(bucket.start, bucket.stop)
        assert bucket.perplexity == pytest.approx(nll[:, part].mean().exp().item(), rel=1e-5)
        assert bucket.kl == pytest.approx(kl[:, part].mean().item(), rel=1e-4, abs=1e-6)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_buckets_partition_the_tokens(tiny_llama, data):
    count, length = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 40))
    edges = sorted(data.draw(st.sets(st.integers(1, 60), max_size=5)))
    ids = torch.randint(0, 300, (count, length))
    found = evaluate.by_position(tiny_llama, ids, buckets=edges)
    for cut in (found.buckets, found.curve, [found.overall]):
        assert cut[0].start == 0
        assert cut[-1].stop == length
        assert all(a.stop == b.start for a, b in itertools.pairwise(cut))
        assert all(bucket.tokens > 0 for bucket in cut)
        assert sum(bucket.tokens for bucket in cut) == count * (length - 1)
        mean = sum(bucket.tokens * math.log(bucket.perplexity) for bucket in cut) / (count * (length - 1))
        assert math.exp(mean) == pytest.approx(found.overall.perplexity, rel=1e-9)
    assert {bucket.start for bucket in found.buckets} == {0, *(e for e in edges if e < length - 1)}


def test_slices_and_batches_change_nothing(student, tiny_llama, text, monkeypatch):
    whole = evaluate.by_position(student, text, teacher=tiny_llama, batch_size=1)
    monkeypatch.setattr(positions, "LOGITS_AT_ONCE", 300 * 2 * 5)  # 5 positions of 2 sequences
    parts = evaluate.by_position(student, text, teacher=tiny_llama, batch_size=2)
    for a, b in zip(whole.curve, parts.curve, strict=True):
        assert (a.start, a.stop, a.tokens) == (b.start, b.stop, b.tokens)
        assert a.perplexity == pytest.approx(b.perplexity, rel=1e-5)
        assert a.kl == pytest.approx(b.kl, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("chunk_size", [1, 7, LENGTH - 2])
def test_reading_in_chunks_changes_nothing(student, tiny_llama, text, chunk_size):
    """The teacher, the student and each branch go on from caches of their own."""
    whole, parts = (
        evaluate.compare({"a": student}, tiny_llama, text, ablate=True, batch_size=2, chunk_size=size)
        for size in (LENGTH, chunk_size)
    )
    for a, b in zip(whole.rows, parts.rows, strict=True):
        assert a.name == b.name
        for x, y in zip(a.result.curve, b.result.curve, strict=True):
            assert x.perplexity == pytest.approx(y.perplexity, rel=1e-4)
            assert x.kl == pytest.approx(y.kl, rel=1e-3, abs=1e-5)


def test_no_more_than_a_chunk_is_read_at_once(student, tiny_llama, text, monkeypatch):
    sizes = []
    for model in (student, tiny_llama):
        decoder = model.get_decoder()
        forward = decoder.forward
        monkeypatch.setattr(
            decoder,
            "forward",
            lambda *a, forward=forward, **k: (sizes.append(k["input_ids"].shape[1]), forward(*a, **k))[1],
        )
    evaluate.compare({"a": student}, tiny_llama, text, chunk_size=10)
    assert sizes.count(10) == 2 * 4 * len(text)  # 47 predictions: four whole chunks and one of 7
    assert max(sizes) == 10


def test_a_teacher_that_reads_its_last_tokens_predicts_from_them_alone(student, tiny_llama, text):
    recent, chunk_size = 12, 5
    report = evaluate.compare({"a": student}, tiny_llama, text, recent=recent, chunk_size=chunk_size, buckets=[20])
    assert [row.name for row in report.rows] == ["teacher", "teacher, last 12 tokens", "a"]
    nll = torch.zeros(len(text), LENGTH - 1, dtype=torch.float64)
    for start in range(0, LENGTH - 1, chunk_size):
        stop = min(start + chunk_size, LENGTH - 1)
        first = max(0, stop - recent)
        log_probs = logits_of(tiny_llama, text[:, first:stop]).double().log_softmax(-1)[:, start - first :]
        nll[:, start:stop] = -log_probs.gather(-1, text[:, start + 1 : stop + 1, None]).squeeze(-1)
    found = report["teacher, last 12 tokens"].result
    for bucket in [*found.buckets, found.overall]:
        expected = nll[:, bucket.start : bucket.stop].mean().exp().item()
        assert bucket.perplexity == pytest.approx(expected, rel=1e-5)
    assert found.overall.kl > 1e-4
    memory = report["teacher, last 12 tokens"].memory
    assert memory[2048] == memory[32768] == kv_bytes(tiny_llama, recent)
    with pytest.raises(LizardzooError, match="at most half of them, got 7"):
        evaluate.compare({}, tiny_llama, text, recent=12, chunk_size=7)
    with pytest.raises(LizardzooError, match="there is no teacher"):
        evaluate.compare({"a": student}, None, text, recent=12, chunk_size=6)


def test_the_same_call_gives_the_same_numbers(student, tiny_llama, text):
    first, second = (evaluate.by_position(student, text, teacher=tiny_llama) for _ in range(2))
    assert first == second


def test_the_teacher_has_no_distance_to_itself(tiny_llama, text):
    found = evaluate.by_position(tiny_llama, text, teacher=copy.deepcopy(tiny_llama))
    assert all(bucket.kl == 0 for bucket in [*found.buckets, found.overall, *found.curve])


def test_a_student_is_its_teacher_inside_the_window_and_not_beyond(student, tiny_llama, text):
    inside, beyond = evaluate.by_position(student, text, teacher=tiny_llama).buckets
    assert (inside.start, inside.stop, beyond.start) == (0, WINDOW, WINDOW)
    assert abs(inside.kl) < 1e-6
    assert beyond.kl > 1e-4


def test_without_a_teacher_there_is_no_kl(tiny_llama, text):
    assert evaluate.by_position(tiny_llama, text).overall.kl is None


def test_the_window_makes_the_first_edge(tiny_llama):
    ids = torch.randint(0, 300, (1, 1100))
    labels = lambda **kwargs: [b.label for b in evaluate.by_position(tiny_llama, ids, **kwargs).buckets]  # noqa: E731
    assert labels() == ["0-127", "128-511", "512-1023", "1024-1099"]
    assert labels(window=64) == ["0-63", "64-511", "512-1023", "1024-1099"]
    assert labels(window=512) == ["0-511", "512-1023", "1024-1099"]
    assert labels(window=4096) == ["0-1099"]
    assert labels(buckets=[1]) == ["0", "1-1099"]


def test_a_model_in_training_stays_in_training(student, text):
    student.train()
    before = evaluate.by_position(student, text)
    assert student.training
    assert evaluate.by_position(student.eval(), text) == before
    assert not student.training
    assert all(p.grad is None for p in student.parameters())


def test_progress_counts_the_sequences(tiny_llama, text):
    calls = []
    evaluate.by_position(tiny_llama, text, batch_size=2, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(2, 3), (3, 3)]


def test_a_diverged_model_is_reported_as_infinite(tiny_llama, text):
    with torch.no_grad():
        tiny_llama.lm_head.weight.mul_(1e4)
    assert evaluate.by_position(tiny_llama, text).overall.perplexity == math.inf


def test_a_family_that_changes_its_logits_is_refused(tiny_llama, text):
    class Capped(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = 3 * torch.tanh(out.logits / 3)
            return out

    tiny_llama.__class__ = Capped
    with pytest.raises(LizardzooError, match="does more to its logits"):
        evaluate.by_position(tiny_llama, text)


@pytest.mark.parametrize(
    ("ids", "arguments", "message"),
    [
        ([[1, 2]], {}, r"token ids \[N, T\], got list"),
        (torch.ones(2, 4), {}, r"got torch.float32 \[2, 4\]"),
        (torch.ones(4, dtype=torch.long), {}, r"got torch.int64 \[4\]"),
        (torch.ones(1, 1, dtype=torch.long), {}, "at least 2 tokens"),
        (torch.full((1, 4), 300), {}, "300 to 300, but the vocabulary has 300 words"),
        (torch.full((1, 4), -100), {}, "no padding"),
        (torch.ones(1, 4, dtype=torch.long), {"buckets": [4, 4]}, "rising"),
        (torch.ones(1, 4, dtype=torch.long), {"buckets": [0]}, "above 0"),
        (torch.ones(1, 4, dtype=torch.long), {"window": 0}, "above 0"),
        (torch.ones(1, 4, dtype=torch.long), {"window": 2, "buckets": [3]}, "give one of them"),
        (torch.ones(1, 4, dtype=torch.long), {"batch_size": 0}, "batch_size"),
        (torch.ones(1, 4, dtype=torch.long), {"chunk_size": 0}, "chunk_size must be at least 1"),
    ],
)
def test_wrong_input_gets_one_sentence(tiny_llama, ids, arguments, message):
    with pytest.raises(LizardzooError, match=message):
        evaluate.by_position(tiny_llama, ids, **arguments)


def test_models_of_two_vocabularies_are_refused(tiny_llama, text):
    other = copy.deepcopy(tiny_llama)
    other.resize_token_embeddings(320)
    with pytest.raises(LizardzooError, match="300 and 320 words"):
        evaluate.by_position(tiny_llama, text, teacher=other)


# --- branches


@pytest.mark.parametrize("branch", ["linear", "window"])
def test_switching_a_branch_off_and_on_restores_the_logits(student, text, branch):
    before = logits_of(student, text)
    with evaluate.without(student, branch) as model:
        assert model is student
        assert not torch.allclose(logits_of(student, text), before)
        with evaluate.without(student, branch):
            pass
        assert all(mixer.switched_off == {branch} for mixer in student.mixers().values())
    assert torch.equal(logits_of(student, text), before)


def test_a_branch_is_switched_on_again_after_an_error(student):
    with pytest.raises(ZeroDivisionError), evaluate.without(student, "linear"):
        _ = 1 / 0
    assert all(mixer.switched_off == set() for mixer in student.mixers().values())


def test_a_hybrid_without_its_linear_branch_is_the_bare_window(student, tiny_llama, text):
    window = lz.Window(window=WINDOW, keep=2)
    bare = lz.linearize(tiny_llama, [window, lz.Softmax(), window])
    with evaluate.without(student, "linear"):
        torch.testing.assert_close(logits_of(student, text), logits_of(bare, text), rtol=1e-4, atol=1e-4)


def test_an_unknown_branch_lists_what_exists(student, tiny_llama):
    with (
        pytest.raises(LizardzooError, match="its branches are: linear, window"),
        evaluate.without(student, "near"),
    ):
        pass
    with pytest.raises(LizardzooError, match="not linearized"), evaluate.without(tiny_llama, "linear"):
        pass


# --- the state-matched window


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keep", [0, 4])
def test_the_matched_window_has_the_students_bytes(tiny_llama, dtype, keep):
    layers = [lz.Hybrid(window=32), lz.Softmax(), lz.GatedLinear()]
    student = lz.linearize(tiny_llama, layers, dtype=dtype)
    window = evaluate.state_matched_window(student, keep=keep)
    matched = evaluate.matched_layers(student, keep=keep)
    bare = lz.Window(window=window, keep=keep)
    assert matched == [bare, lz.Softmax(), bare]
    baseline = lz.linearize(tiny_llama, matched, dtype=dtype)
    a_token = 2 * (2 * 2 * 16 * dtype.itemsize + 1)  # keys and values of 2 heads of 16 and a mask bit, in 2 layers
    assert abs(state_bytes(baseline) - state_bytes(student)) < a_token
    assert window > 32


def test_a_bare_window_is_matched_by_itself(tiny_llama):
    student = lz.linearize(tiny_llama, lz.Window(window=37, keep=4))
    assert evaluate.state_matched_window(student, keep=4) == 37
    assert evaluate.state_matched_window(student, keep=0) > 37


def test_a_state_that_no_window_matches_is_refused(tiny_llama):
    with pytest.raises(LizardzooError, match="LlamaForCausalLM has no mixer"):
        evaluate.state_matched_window(tiny_llama)
    with pytest.raises(LizardzooError, match="smaller keep"):
        evaluate.state_matched_window(lz.linearize(tiny_llama, lz.Window(window=2, keep=0)), keep=100)


# --- reports


def test_a_report_holds_what_by_position_finds(student, tiny_llama, text):
    bare = lz.linearize(tiny_llama, "window")
    report = evaluate.compare({"student": student, "bare": bare}, tiny_llama, text, ablate=["student"])
    names = ["teacher", "student", "student without linear", "student without window", "bare"]
    assert [row.name for row in report.rows] == names
    assert (report.sequences, report.length) == tuple(text.shape)
    for name, model in (("teacher", tiny_llama), ("student", student), ("bare", bare)):
        alone = evaluate.by_position(model, text, teacher=tiny_llama, window=WINDOW)
        assert report[name].result == alone
    with evaluate.without(student, "window"):
        alone = evaluate.by_position(student, text, teacher=tiny_llama)
    assert report["student without window"].result == alone
    assert all(mixer.switched_off == set() for mixer in student.mixers().values())


def test_ablation_of_all_models_leaves_the_teacher_alone(student, tiny_llama, text):
    report = evaluate.compare({"a": student}, tiny_llama, text, ablate=True)
    assert [row.name for row in report.rows] == ["teacher", "a", "a without linear", "a without window"]


def test_bytes_are_those_that_a_cache_holds(student, tiny_llama):
    report = evaluate.compare({"student": student}, tiny_llama, torch.ones(1, 4, dtype=torch.long), lengths=(64, 128))
    ids = torch.randint(0, 300, (1, 64))
    for name, model in (("teacher", tiny_llama), ("student", student)):
        with torch.no_grad():
            cache = model(input_ids=ids, use_cache=True)[CACHE_KEYWORD]
        assert cache_bytes(cache) == pytest.approx(report[name].memory[64], rel=0.01)
    assert report["teacher"].memory[128] == kv_bytes(tiny_llama, 128) == 2 * report["teacher"].memory[64]
    grown = report["student"].memory[128] - report["student"].memory[64]
    assert grown == report["teacher"].memory[64] / 3  # one softmax layer of three


def test_a_report_survives_json(student, tiny_llama, text):
    report = evaluate.compare({"student": student}, tiny_llama, text)
    values = json.loads(report.to_json())
    assert values == report.to_dict()
    assert values["rows"][1]["name"] == "student"
    assert values["rows"][1]["result"]["buckets"][1]["kl"] == report["student"].result.buckets[1].kl
    assert list(values["rows"][0]["memory"]) == ["2048", "32768", "131072"]


def test_tables_show_every_row_and_bucket(student, tiny_llama, text):
    report = evaluate.compare({"student": student}, tiny_llama, text, ablate=True)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(report.table(), report.memory_table())
    shown = console.export_text()
    for row in report.rows:
        assert row.name in shown
        assert f"{row.result.overall.perplexity:.2f}" in shown
    for bucket in report.rows[0].result.buckets:
        assert bucket.label in shown
    assert "128K tokens" in shown
    assert f"{report['student'].result.overall.kl:.4f}" in shown


def test_a_plot_is_written_where_it_is_asked_for(student, tiny_llama, text, tmp_path):
    for teacher in (tiny_llama, None):
        report = evaluate.compare({"student": student}, teacher, text)
        path = report.plot(tmp_path / "new" / "plot.png")
        assert path.read_bytes().startswith(b"\x89PNG")


def test_a_plot_without_matplotlib_says_what_to_install(tiny_llama, text, tmp_path, monkeypatch):
    report = evaluate.compare({}, tiny_llama, text)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(LizardzooError, match=r"pip install \"lizardzoo\[eval\]\""):
        report.plot(tmp_path / "plot.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("names", "arguments", "message"),
    [
        (["teacher"], {}, "teacher's own row"),
        (["a"], {"ablate": ["b"]}, "'b', which is none of the models: a"),
    ],
)
def test_names_that_do_not_fit_are_refused(tiny_llama, text, names, arguments, message):
    with pytest.raises(LizardzooError, match=message):
        evaluate.compare(dict.fromkeys(names, tiny_llama), tiny_llama, text, **arguments)
    with pytest.raises(LizardzooError, match="no model to compare"):
        evaluate.compare({}, None, text)


# --- text


def test_sequences_are_the_text_in_order(tiny_tokenizer, tmp_path):
    text = "A lizard lost its tail and grew another one.\n" * 20
    ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
    cut = evaluate.sequences(text, tiny_tokenizer, 32)
    assert cut.dtype == torch.long
    assert cut.flatten().tolist() == ids[: len(ids) // 32 * 32]
    assert torch.equal(evaluate.sequences(text, tiny_tokenizer, 32, limit=2), cut[:2])
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    for path in (tmp_path / "a.txt", str(tmp_path / "a.txt"), tmp_path / "a.txt.gz"):
        assert torch.equal(evaluate.sequences(path, tiny_tokenizer, 32), cut)


def test_every_sequence_begins_as_the_tokenizer_begins_a_text(tiny_tokenizer: PreTrainedTokenizerFast):
    from tokenizers.processors import TemplateProcessing

    text = "A lizard lost its tail and grew another one.\n" * 20
    bos = tiny_tokenizer.bos_token_id
    bare = evaluate.sequences(text, tiny_tokenizer, 31)
    tiny_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tiny_tokenizer.bos_token} $A", special_tokens=[(tiny_tokenizer.bos_token, bos)]
    )
    cut = evaluate.sequences(text, tiny_tokenizer, 32)
    assert (cut[:, 0] == bos).all()
    assert torch.equal(cut[:, 1:], bare)


@pytest.mark.parametrize("length", [1, 0, 2.0, True])
def test_a_length_that_is_none_is_refused(tiny_tokenizer, length):
    with pytest.raises(LizardzooError, match="length must be a whole number of at least 2"):
        evaluate.sequences("text", tiny_tokenizer, length)


def test_a_text_that_does_not_fit_gets_one_sentence(tiny_tokenizer, tmp_path):
    with pytest.raises(LizardzooError, match=r"'wiki.txt' \(no file has that name\).*fewer than one sequence of 64"):
        evaluate.sequences("wiki.txt", tiny_tokenizer, 64)
    with pytest.raises(LizardzooError, match="there is no text file"):
        evaluate.sequences(tmp_path / "wiki.txt", tiny_tokenizer, 64)
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(LizardzooError, match=r"the text in .*short.txt has \d+ tokens"):
        evaluate.sequences(tmp_path / "short.txt", tiny_tokenizer, 64)
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1") * 99)
    with pytest.raises(LizardzooError, match="not UTF-8"):
        evaluate.sequences(tmp_path / "latin.txt", tiny_tokenizer, 4)
    (tmp_path / "a.gz").write_bytes(b"no gzip")
    with pytest.raises(LizardzooError, match="not a whole gzip file"):
        evaluate.sequences(tmp_path / "a.gz", tiny_tokenizer, 4)
    with pytest.raises(LizardzooError, match="no file has that name"):
        evaluate.sequences("one long line " * 30, tiny_tokenizer, 4096)
    with pytest.raises(LizardzooError, match="limit must be"):
        evaluate.sequences("text" * 99, tiny_tokenizer, 4, limit=0)


# --- lm-eval


@pytest.fixture
def tasks(tmp_path):
    """A folder with one multiple-choice task of 12 questions, as lm-eval reads it, and the questions."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    questions = [
        {
            "q": f"{i} lizards and {i} more are",
            "choices": [f" {2 * i}", f" {i} tails", " none"],
            "label": i % 3,
        }
        for i in range(12)
    ]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in questions))
    (folder / "lizards.yaml").write_text(
        "task: lizards\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        "output_type: multiple_choice\n"
        "test_split: test\n"
        'doc_to_text: "{{q}}"\n'
        'doc_to_choice: "{{choices}}"\n'
        "doc_to_target: label\n"
        'target_delimiter: ""\n'
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    return folder, questions


def test_lm_eval_scores_as_one_does_by_hand(student, tiny_tokenizer, tasks):
    folder, questions = tasks
    right = 0
    for question in questions:
        prompt = tiny_tokenizer(question["q"])["input_ids"]
        scores = []
        for choice in question["choices"]:
            whole = tiny_tokenizer(question["q"] + choice)["input_ids"]
            log_probs = logits_of(student, torch.tensor([whole]))[0].log_softmax(-1)
            scores.append(sum(log_probs[i - 1, whole[i]].item() for i in range(len(prompt), len(whole))))
        right += scores.index(max(scores)) == question["label"]
    found = evaluate.lm_eval(student, tiny_tokenizer, "lizards", folder, batch_size=4)
    assert found["lizards"]["acc,none"] == pytest.approx(right / len(questions))
    assert 0 < right < len(questions)
    assert evaluate.lm_eval(student, tiny_tokenizer, None, folder, limit=3).keys() == {"lizards"}


def test_lm_eval_says_what_is_missing(tiny_llama, tiny_tokenizer, tasks, tmp_path, monkeypatch):
    folder, _ = tasks
    with pytest.raises(LizardzooError, match="there is no folder"):
        evaluate.lm_eval(tiny_llama, tiny_tokenizer, None, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(LizardzooError, match="defines no task"):
        evaluate.lm_eval(tiny_llama, tiny_tokenizer, None, tmp_path / "empty")
    with pytest.raises(LizardzooError, match="no tasks are named"):
        evaluate.lm_eval(tiny_llama, tiny_tokenizer)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(LizardzooError, match=r"pip install \"lizardzoo\[eval\]\""):
        evaluate.lm_eval(tiny_llama, tiny_tokenizer, "lizards", folder)


@pytest.mark.slow  # lm-eval indexes its own tasks
def test_lm_eval_takes_no_unknown_task(tiny_llama, tiny_tokenizer, tasks):
    with pytest.raises(LizardzooError, match="lm-eval knows no task 'snakes'"):
        evaluate.lm_eval(tiny_llama, tiny_tokenizer, ["lizards", "snakes"], tasks[0])
