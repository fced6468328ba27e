"""The command line: each verb on a tiny model, and every mistake one red line with nothing half written."""

import gzip
import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import lizardzoo as lz
from lizardzoo import evaluate
from lizardzoo.cache import kv_bytes, state_bytes
from lizardzoo.cli import app
from lizardzoo.cli.models import read_layers
from lizardzoo.config import MIXERS, PRESETS, describe_spec, layer_map
from lizardzoo.distill.recipe import RECIPES, Finetune, Recipe, Stage
from lizardzoo.errors import LizardzooError
from lizardzoo.evaluate.report import human_bytes

WIDE = {"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}
TEXT = "The lizard on the wall lost its tail and slowly grew another one. " * 60


def lizardzoo(*arguments):
    """Run the command line; returns exit code, standard output and standard error."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], env=WIDE)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def succeed(*arguments):
    code, out, err = lizardzoo(*arguments)
    assert code == 0, err
    return out


def fail(*arguments, code=1):
    """The one line of the error."""
    found, _, err = lizardzoo(*arguments)
    assert found == code, err
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="session")
def student_folder(tiny_folder, tmp_path_factory):
    """What `linearize` writes of the tiny Llama, with a window of 8; read it, never write into it."""
    home = tmp_path_factory.mktemp("cli")
    (home / "layers.json").write_text(json.dumps([{"type": "hybrid", "window": 8}] * 3))
    succeed(
        "linearize",
        tiny_folder,
        "--layers",
        home / "layers.json",
        "--softmax",
        "1",
        "--out",
        home / "student",
    )
    return home / "student"


def left_behind(folder):
    """Whatever stands in a folder, hidden names included."""
    return sorted(path.name for path in folder.iterdir())


# --- linearize


def test_linearize_writes_a_model_that_loads_and_its_tokenizer(student_folder, tiny_folder, tiny_llama):
    model = lz.from_pretrained(student_folder)
    hybrid = lz.Hybrid(window=8)
    assert model.config.specs == [hybrid, lz.Softmax(), hybrid]
    assert torch.equal(model.model.embed_tokens.weight, tiny_llama.model.embed_tokens.weight)
    assert AutoTokenizer.from_pretrained(student_folder).get_vocab() == (
        AutoTokenizer.from_pretrained(tiny_folder).get_vocab()
    )
    assert left_behind(student_folder.parent) == ["layers.json", "student"]


def test_linearize_tells_what_it_did(tiny_folder, tmp_path):
    out = succeed("linearize", tiny_folder, "--softmax", "1", "--out", tmp_path / "student")
    for line in ("0  recommended", "1  softmax", "2  recommended", "new", f"saved to {tmp_path / 'student'}"):
        assert line in out


def test_linearize_calibrates_on_the_text(tiny_folder, text_file, tmp_path):
    (tmp_path / "l.py").write_text("import lizardzoo as lz\nlayers = [lz.Hybrid(window=8), lz.Softmax(), 'window']\n")
    common = ("linearize", tiny_folder, "--layers", tmp_path / "l.py", "--dtype", "float32")
    succeed(*common, "--out", tmp_path / "plain")
    succeed(*common, "--calibrate", text_file, "--out", tmp_path / "calibrated")
    plain, calibrated = (lz.from_pretrained(tmp_path / name) for name in ("plain", "calibrated"))
    assert plain.config.specs == [lz.Hybrid(window=8), lz.Softmax(), lz.Window()]
    teacher = AutoModelForCausalLM.from_pretrained(tiny_folder)
    expected = lz.linearize(
        teacher, plain.config.specs, calibrate=TEXT, tokenizer=AutoTokenizer.from_pretrained(tiny_folder)
    )
    for name, value in expected.state_dict().items():
        assert torch.equal(calibrated.state_dict()[name], value), name
    assert any(not torch.equal(value, plain.state_dict()[name]) for name, value in expected.state_dict().items())


def test_linearize_casts_what_is_kept_and_not_what_is_new(tiny_folder, tmp_path):
    succeed("linearize", tiny_folder, "--layers", "hybrid", "--dtype", "bfloat16", "--out", tmp_path / "student")
    dtypes = {".mixer." in n: p.dtype for n, p in lz.from_pretrained(tmp_path / "student").named_parameters()}
    assert dtypes == {False: torch.bfloat16, True: torch.float32}


def test_linearize_does_without_a_tokenizer(tiny_llama, text_file, tmp_path):
    tiny_llama.save_pretrained(tmp_path / "bare")
    code, _, err = lizardzoo("linearize", tmp_path / "bare", "--out", tmp_path / "student")
    assert code == 0
    assert "note: no tokenizer goes along" in err
    assert lz.from_pretrained(tmp_path / "student").config.num_hidden_layers == 3
    error = fail("linearize", tmp_path / "bare", "--calibrate", text_file, "--out", tmp_path / "other")
    assert "tokenizer" in error
    assert not (tmp_path / "other").exists()


def test_linearize_goes_on_with_what_a_stopped_one_left(tiny_folder, tmp_path):
    def stop(done, total):
        if done == 1:
            raise KeyboardInterrupt

    size = ("--max-shard-size", "100KB")
    succeed("linearize", tiny_folder, *size, "--out", tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        lz.linearize_checkpoint(tiny_folder, tmp_path / "student", max_shard_size="100KB", progress=stop)
    code, _, err = lizardzoo("linearize", tiny_folder, *size, "--out", tmp_path / "student")
    assert code == 0
    assert f"going on with {tmp_path / 'student'}.unfinished" in err
    files = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert len([name for name in files if name.endswith(".safetensors")]) > 2
    left = {path.name: path.read_bytes() for path in (tmp_path / "student").iterdir()}
    assert {name: left[name] for name in left if "token" not in name} == {
        n: files[n] for n in files if "token" not in n
    }
    assert "'5 apples' is not a size" in fail("linearize", tiny_folder, "--max-shard-size", "5 apples", "--out", "new")


@pytest.mark.parametrize("preset", ["recommended", "hybrid"])
def test_a_dry_run_shows_the_plan_and_reads_no_weights(preset, tiny_folder, tmp_path):
    (tmp_path / "bare").mkdir()
    shutil.copy(tiny_folder / "config.json", tmp_path / "bare")
    given = () if preset == "recommended" else ("--layers", preset)
    out = succeed("linearize", tmp_path / "bare", *given, "--softmax", "1", "--dry-run")
    student = lz.linearize(tiny_folder, [preset, "softmax", preset])
    new = sum(p.numel() for n, p in student.named_parameters() if ".mixer." in n)
    wanted = (
        f"{new:,}",
        preset,
        "softmax",
        "8,192",
        "32,768",
        "131,072",
        "finetune",
        "checkpointed",
    )
    for text in (*wanted, human_bytes(state_bytes(student)), human_bytes(kv_bytes(student, 32768))):
        assert text in out
    assert ("│ transfer " in out) == (new > 0)
    said = "no stage transfer: the mixers have no parameters of their own"
    assert (said in " ".join(out.split())) == (new == 0)
    assert left_behind(tmp_path) == ["bare"]
    assert "unknown preset" in fail("linearize", tmp_path / "bare", "--layers", "lizzard", "--dry-run")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "lizzard"], "unknown preset 'lizzard'; there are: "),
        (["--layers", "nowhere.json"], "there is no layers file"),
        (["--layers", "bad.json"], "bad.json is not JSON"),
        (["--layers", "short.json"], "2 entries but the model has 3 layers"),
        (["--layers", "field.json"], "has no field 'width'"),
        (["--layers", "zero.py"], "window must be"),
        (["--layers", "empty.py"], "defines no `layers`"),
        (["--softmax", "3"], "layer 3, but the model's layers are 0 to 2"),
        (["--softmax", "a-b"], "write it as 9,19-21"),
        (["--calibrate", "nowhere.txt"], "there is no text file 'nowhere.txt'"),
        (["--layers", "hybrid", "--calibrate", "short.txt"], "calibration text"),
    ],
)
def test_a_wrong_layers_list_is_one_line_and_nothing_is_written(tiny_folder, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    files = {
        "bad.json": "[softmax",
        "short.json": '["softmax", "softmax"]',
        "field.json": '[{"type": "window", "width": 3}, "softmax", "softmax"]',
        "zero.py": "import lizardzoo as lz\nlayers = lz.Window(window=0)\n",
        "empty.py": "layer = 1\n",
        "short.txt": "a word",
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert message in fail("linearize", tiny_folder, *arguments, "--out", "new/student")
    assert left_behind(tmp_path) == sorted([*files, *(["new"] if (tmp_path / "new").exists() else [])])
    assert not (tmp_path / "new").exists() or left_behind(tmp_path / "new") == []


def test_a_used_folder_is_refused_before_any_work(tiny_folder, text_file, tmp_path):
    used = tmp_path / "used"
    used.mkdir()
    (used / "thesis.txt").write_text("mine")
    assert "is not empty" in fail("linearize", "no/such-model", "--out", used)
    assert "is not empty" in fail("distill", "no/such-model", "--data", "nothing.txt", "--out", used)
    assert "is not empty" in fail("eval", "no/such-model", "--text", text_file, "--out", used)
    assert "is a file" in fail("linearize", "no/such-model", "--out", text_file)
    assert left_behind(used) == ["thesis.txt"]
    empty = tmp_path / "empty"
    empty.mkdir()
    succeed("linearize", tiny_folder, "--layers", "softmax", "--out", empty)
    assert (empty / "config.json").is_file()


def test_a_missing_model_is_one_line(text_file, tmp_path):
    for command in (
        ("linearize", "no/such-model", "--out", tmp_path / "out"),
        ("distill", "no/such-model", "--data", text_file, "--out", tmp_path / "out"),
        ("eval", "no/such-model", "--text", text_file),
        ("generate", "no/such-model", "Hello"),
        ("info", "no/such-model"),
    ):
        assert "cannot load 'no/such-model" in fail(*command)
    assert left_behind(tmp_path) == ["text.txt"]


def test_an_unsupported_architecture_is_refused(tmp_path):
    from transformers import GPT2Config

    GPT2Config(n_layer=1, n_embd=16, n_head=2).save_pretrained(tmp_path / "gpt2")
    assert "cannot linearize a 'gpt2' model" in fail("linearize", tmp_path / "gpt2", "--out", tmp_path / "out")
    assert left_behind(tmp_path) == ["gpt2"]


def test_debug_shows_the_traceback():
    with pytest.raises(LizardzooError, match="cannot load 'no/such-model'"):
        lizardzoo("--debug", "info", "no/such-model")


def test_wrong_usage_ends_with_code_2(tiny_folder):
    for arguments in (("linearize", tiny_folder), ("frobnicate",), ("list", "lizards")):
        code, _, err = lizardzoo(*arguments)
        assert code == 2
        assert "Traceback" not in err


def test_version_and_help():
    assert succeed("--version").startswith("lizardzoo ")
    assert "lizardzoo linearize" in succeed("--help")
    for command in (
        "list",
        "info",
        "linearize",
        "distill",
        "eval",
        "diagnose",
        "select-layers",
        "select-windows",
        "generate",
    ):
        assert "Usage" in succeed(command, "--help")


# --- layer lists


def test_layer_lists_are_read_and_shown(tmp_path):
    specs = read_layers("recommended", "0, 2-3", 5)
    assert [spec.keeps_softmax for spec in specs] == [True, False, True, True, False]
    assert layer_map(specs) == [
        ("0", "softmax"),
        ("1", "recommended"),
        ("2-3", "softmax"),
        ("4", "recommended"),
    ]
    assert describe_spec(lz.Window(window=7, sinks=2)) == "window window=7 sinks=2"
    path = tmp_path / "layers.json"
    path.write_text(json.dumps([spec.to_dict() for spec in specs]))
    assert read_layers(str(path), None, 5) == specs


# --- list and info


def test_list_shows_everything_that_is_registered():
    out = succeed("list")
    for name in [*PRESETS, *MIXERS, *RECIPES, "llama", "gate_init", "0.999"]:
        assert name in out
    narrow = succeed("list", "recipes")
    assert "recipes" in narrow
    assert "presets" not in narrow


def test_info_counts_parameters_and_bytes(student_folder):
    out = succeed("info", student_folder)
    model = lz.from_pretrained(student_folder)
    sizes = {new: sum(p.numel() for n, p in model.named_parameters() if (".mixer." in n) == new) for new in (0, 1)}
    teacher = AutoModelForCausalLM.from_pretrained(student_folder).config.num_hidden_layers
    assert teacher == 3
    for shown in (
        f"{sizes[0]:,}",
        f"{sizes[1]:,}",
        "hybrid window=8",
        human_bytes(state_bytes(model)),
        human_bytes(kv_bytes(model, 131072)),
        human_bytes(3 * kv_bytes(model, 131072)),
        "131,072",
    ):
        assert shown in out, shown


def test_info_names_adapter_and_kernels(tiny_folder, tmp_path):
    """head_dim 16 is a power of two, feature_dim 12 is not, and then Triton does not take the branch."""
    layers = [lz.Hybrid(feature_dim=12), lz.Hybrid(merge="sum", window_rope=False), lz.Softmax()]
    lz.linearize(tiny_folder, layers).save_pretrained(tmp_path / "student")
    out = " ".join(succeed("info", tmp_path / "student").replace("│", " ").split())
    assert "adapter: LizardLlamaForCausalLM" in out
    assert "hybrid_attention 0 reference refused" in out
    assert "window_attention 1 reference triton" in out
    assert "gated_linear_attention 1 reference triton" in out
    assert "rotate 0 reference triton" in out
    assert "token_gates 0-1 reference triton" in out
    assert "softmax 2 transformers, sdpa" in out
    assert "adapter: LizardLlamaForCausalLM, once linearized" in succeed("info", tiny_folder)


def test_info_of_a_teacher_has_nothing_new(tiny_folder):
    out = succeed("info", tiny_folder)
    assert "0-2" in out
    assert "softmax" in out
    assert "new (mixers, fp32)" in out


# --- eval


def test_eval_reports_what_evaluate_finds(student_folder, tiny_folder, text_file, tmp_path):
    out = succeed(
        "eval", student_folder, "--teacher", tiny_folder, "--text", text_file, "--length", 64, "--limit", 2,
        "--ablate", "--out", tmp_path / "report",
    )  # fmt: skip
    assert left_behind(tmp_path / "report") == ["by_position.png", "report.json"]
    assert (tmp_path / "report" / "by_position.png").read_bytes().startswith(b"\x89PNG")
    for name in ("by_position.png", "report.json"):
        assert f"wrote {tmp_path / 'report' / name}" in out
    result = json.loads((tmp_path / "report" / "report.json").read_text())

    student, teacher = lz.from_pretrained(student_folder), AutoModelForCausalLM.from_pretrained(tiny_folder)
    ids = evaluate.sequences(text_file, AutoTokenizer.from_pretrained(tiny_folder), 64, 2)
    window = evaluate.state_matched_window(student)
    bare = f"bare window {window} (for student)"
    models = {"student": student, bare: lz.linearize(teacher, evaluate.matched_layers(student))}
    expected = evaluate.compare(models, teacher, ids, ablate=["student"])
    assert result["positions"] == {"text.txt": expected.to_dict()}
    assert result["texts"] == {"text.txt": str(text_file)}
    assert result["models"] == {"student": str(student_folder)}
    for row in expected.rows:
        assert row.name in out


def test_eval_prints_json_and_nothing_else(student_folder, text_file):
    out = succeed("eval", student_folder, "--text", text_file, "--length", 64, "--limit", 1, "--json")
    rows = json.loads(out)["positions"]["text.txt"]["rows"]
    assert [(row["name"], row["result"]["overall"]["kl"]) for row in rows] == [("student", None)]


def test_a_student_without_a_tokenizer_takes_its_teachers(student_folder, tiny_folder, text_file, tmp_path):
    """`save_pretrained` of a model writes none."""
    alone = tmp_path / "alone"
    lz.from_pretrained(student_folder).save_pretrained(alone)
    error = fail("eval", alone, "--text", text_file)
    assert f"no tokenizer can be read beside the model in '{alone}'" in error and "save_pretrained" in error

    def perplexity(model):
        found = json.loads(succeed("eval", model, "--teacher", tiny_folder, "--text", text_file, "--json"))
        return [row["result"] for row in found["positions"]["text.txt"]["rows"]]

    assert perplexity(alone) == perplexity(student_folder)
    sizes = tmp_path / "sizes.json"
    succeed("select-windows", alone, "--teacher", tiny_folder, "--text", text_file, "--length", 64, "--out", sizes)
    succeed("diagnose", alone, "--teacher", tiny_folder, "--text", text_file, "--length", 64)


def test_eval_compares_several_models(student_folder, tiny_folder, text_file, tmp_path):
    other = tmp_path / "student"  # the same last part: full names tell them apart
    shutil.copytree(student_folder, other)
    out = succeed(
        "eval", student_folder, other, "-t", tiny_folder, "--text", text_file, "--length", 32, "--limit", 1,
        "--json",
    )  # fmt: skip
    names = [row["name"] for row in json.loads(out)["positions"]["text.txt"]["rows"]]
    assert names[:3] == ["teacher", str(student_folder), str(other)]
    assert len(names) == 4  # one baseline for both: their states are alike
    out = succeed("eval", other, "-t", tiny_folder, "--text", text_file, "--length", 32, "--no-baseline", "--json")
    assert [row["name"] for row in json.loads(out)["positions"]["text.txt"]["rows"]] == ["teacher", "student"]


def test_eval_runs_local_tasks(student_folder, tiny_folder, tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "data.jsonl"
    data.write_text(
        "".join(json.dumps({"q": f"{i} and", "choices": [" one", " two"], "label": 0}) + "\n" for i in range(6))
    )
    (folder / "task.yaml").write_text(
        "task: tails\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        'output_type: multiple_choice\ntest_split: test\ndoc_to_text: "{{q}}"\ndoc_to_choice: "{{choices}}"\n'
        "doc_to_target: label\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    expected = evaluate.lm_eval(lz.from_pretrained(student_folder), tokenizer, "tails", folder, limit=4)
    arguments = ("eval", student_folder, "-t", tiny_folder, "--tasks", folder, "--task-limit", 4)
    scores = json.loads(succeed(*arguments, "--json"))["tasks"]
    assert scores["student"]["tails"]["acc,none"] == expected["tails"]["acc,none"]
    assert scores.keys() == {"teacher", "student"}
    out = succeed(*arguments, "--out", tmp_path / "out")
    assert "tails" in out
    assert f"{expected['tails']['acc,none']:.4f}" in out
    assert left_behind(tmp_path / "out") == ["report.json"]


def test_eval_asks_for_facts_and_questions_of_local_files(student_folder, tiny_folder, text_file, tmp_path):
    rows = [{"query": f"{i} and", "choices": ["one", "two"], "gold": i % 2} for i in range(6)]
    questions = tmp_path / "sums.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    second = tmp_path / "second.txt"
    second.write_text(TEXT)
    arguments = (
        "eval", student_folder, "-t", tiny_folder, "--text", text_file, "--text", second, "--length", 48, "--limit", 1,
        "--chunk-size", 16, "--recent", 32, "--distances", "8,32", "--samples", 2, "--facts", 2, "--ablate",
        "--tasks", questions, "--few-shot", 2, "--few-shot-from", questions, "--out", tmp_path / "out",
    )  # fmt: skip
    out = succeed(*arguments)
    plots = ["by_position_second.png", "by_position_text.png"]
    assert left_behind(tmp_path / "out") == [*plots, "report.json", "retrieval.png"]
    result = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [row["name"] for row in result["positions"]["second.txt"]["rows"]][:2] == [
        "teacher",
        "teacher, last 32 tokens",
    ]
    student, teacher = lz.from_pretrained(student_folder), AutoModelForCausalLM.from_pretrained(tiny_folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    expected = evaluate.retrieval(
        {"student": student}, teacher, tokenizer, text_file, distances=(8, 32), pairs=2, samples=2, ablate=True,
        chunk_size=16,
    )  # fmt: skip
    for row in expected.to_dict()["rows"]:
        assert row in result["retrieval"]["rows"]
        assert row["name"] in out
    names = evaluate.question_tasks([questions], tmp_path / "tasks", few_shot=2, examples=questions)
    scores = evaluate.lm_eval(student, tokenizer, names, tmp_path / "tasks")
    assert result["tasks"]["student"]["sums, 2-shot"]["acc,none"] == scores["sums"]["acc,none"]
    assert list(result["tasks"]) == ["teacher", "student", "student without linear", "student without window"]
    with evaluate.without(student, "window"):
        without = evaluate.lm_eval(student, tokenizer, names, tmp_path / "tasks")
    assert result["tasks"]["student without window"]["sums, 2-shot"] == without["sums"]


def test_eval_says_what_is_wrong(student_folder, tiny_folder, text_file, tmp_path):
    assert "nothing to measure" in fail("eval", student_folder)
    assert "needs a text" in fail("eval", student_folder, "--distances", "64", "--tasks", "piqa")
    wrong = ("eval", student_folder, "--text", text_file, "--distances", "64,far")
    assert "'far'" in fail(*wrong)
    assert "give --tasks FILES and --few-shot N" in fail(*wrong[:-2], "--length", 64, "--few-shot-from", text_file)
    short = tmp_path / "short.txt"
    short.write_text("short")
    out = tmp_path / "out"
    assert "fewer than one sequence of 2048" in fail("eval", student_folder, "--text", short, "--out", out)
    assert "there is no text file" in fail("eval", student_folder, "--text", tmp_path / "no.txt", "--out", out)
    error = fail("eval", student_folder, "--text", text_file, "--length", 64, "--device", "abacus", "--out", out)
    assert "unknown device 'abacus'" in error
    assert left_behind(tmp_path) == ["short.txt", "text.txt"]


# --- diagnose


def test_diagnose_tells_what_is_wrong(student_folder, tiny_folder, text_file, tmp_path):
    common = ("diagnose", student_folder, "-t", tiny_folder, "--text", text_file, "--length", 48, "--limit", 2)
    out = succeed(*common, "--start", student_folder, "--out", tmp_path / "out")
    assert left_behind(tmp_path / "out") == ["diagnosis.json", "diagnosis.png"]
    student, teacher = lz.from_pretrained(student_folder), AutoModelForCausalLM.from_pretrained(tiny_folder)
    ids = evaluate.sequences(text_file, AutoTokenizer.from_pretrained(tiny_folder), 48, 2)
    expected = lz.diagnose(student, ids, teacher=teacher)
    assert json.loads((tmp_path / "out" / "diagnosis.json").read_text()) == expected.to_dict()
    assert "the model is not trained; run distill first" in out
    assert expected.verdict in out
    questions = tmp_path / "questions.jsonl"
    rows = [{"query": f"{i}?", "choices": ["A", "B"], "gold": i % 2} for i in range(5)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = (*common, "--questions", questions, "--few-shot", 1, "--few-shot-from", questions, "--question-limit", 4)
    assert json.loads(succeed(*asked, "--json"))["letters"]["right"] == {"A": 2, "B": 2}
    assert "A 2  B 2" in succeed(*asked)


def test_diagnose_says_what_is_wrong_with_its_arguments(student_folder, tiny_folder, text_file, tmp_path):
    common = ("--text", text_file, "--length", 48, "--limit", 1, "--out", tmp_path / "out")
    assert "has no mixer to look at" in fail("diagnose", tiny_folder, *common)
    assert "give --questions FILE" in fail("diagnose", student_folder, *common, "--few-shot-from", text_file)
    assert "there is no file of questions" in fail("diagnose", student_folder, *common, "--questions", "no.jsonl")
    assert left_behind(tmp_path) == ["text.txt"]


# --- select-layers


def test_select_layers_writes_a_list_that_linearize_takes(student_folder, tiny_folder, text_file, tmp_path):
    common = ("--text", text_file, "--length", 48, "--limit", 2)
    out = succeed("select-layers", student_folder, *common, "--keep", 2, "--out", tmp_path / "new" / "layers.json")
    ids = evaluate.sequences(text_file, AutoTokenizer.from_pretrained(tiny_folder), 48, 2)
    expected = lz.select_layers(lz.from_pretrained(student_folder), ids, 2)
    assert read_layers(str(tmp_path / "new" / "layers.json"), None, 3) == list(expected)
    assert f"{expected.ranking[0].worth:+.4f}" in out
    succeed("linearize", tiny_folder, "--layers", tmp_path / "new" / "layers.json", "--out", tmp_path / "student")
    assert lz.from_pretrained(tmp_path / "student").config.specs == list(expected)
    (tmp_path / "l.json").write_text('["window", "window", "window"]')
    arguments = ("--keep", 1, "--layers", tmp_path / "l.json", "--greedy", "--json", "--out", tmp_path / "two.json")
    found = json.loads(succeed("select-layers", tiny_folder, *common, *arguments))
    assert found["layers"].count(lz.Window().to_dict()) == 2
    assert "is there already" in fail("select-layers", tiny_folder, *common, *arguments)


def test_select_layers_by_recall(student_folder, tiny_folder, text_file, tmp_path):
    common = ("--text", text_file, "--length", 150, "--limit", 2, "--recall", 12, "--recall", 20)
    out = succeed("select-layers", student_folder, *common, "--keep", 2, "--out", tmp_path / "layers.json")
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    ids, answers = evaluate.recall_sequences(text_file, tokenizer, 150, 2, distances=(12, 20))
    expected = lz.select_layers(lz.from_pretrained(student_folder), ids, 2, weights=answers)
    assert read_layers(str(tmp_path / "layers.json"), None, 3) == list(expected)
    assert f"{expected.ranking[0].worth:+.4f}" in out


def test_select_layers_gives_a_window(tiny_folder, text_file, tmp_path):
    arguments = ["--text", text_file, "--length", 96, "--limit", 2, "--keep", 1, "--window", 64]
    succeed("select-layers", tiny_folder, *arguments, "--out", tmp_path / "layers.json")
    layers = json.loads((tmp_path / "layers.json").read_text())
    assert lz.Window(window=64).to_dict() in layers and {"type": "softmax"} not in layers


def test_select_windows_writes_a_list_that_linearize_takes(student_folder, text_file, tmp_path):
    common = ("--text", text_file, "--length", 48, "--limit", 2)
    out = succeed("select-windows", student_folder, *common, "--octaves", 1, "--out", tmp_path / "layers.json")
    ids = evaluate.sequences(text_file, AutoTokenizer.from_pretrained(student_folder), 48, 2)
    expected = lz.select_windows(lz.from_pretrained(student_folder), ids, octaves=1)
    assert read_layers(str(tmp_path / "layers.json"), None, 3) == list(expected)
    assert f"{expected.kl_before:.4f} before" in out
    assert "is there already" in fail("select-windows", student_folder, *common, "--out", tmp_path / "layers.json")


def test_select_windows_by_recall_in_both_fields_and_rounds(tiny_folder, text_file, tmp_path):
    (tmp_path / "layers.json").write_text(json.dumps([lz.Heavy(window=8, heavy=8).to_dict()] * 3))
    common = ("--text", text_file, "--length", 150, "--limit", 2, "--layers", tmp_path / "layers.json", "--octaves", 1)
    recall = ("--recall", 12, "--recall", 20, "--recall-share", 0.5)
    more = ("--field", "window", "--field", "heavy", "--rounds", 2)
    found = json.loads(
        succeed("select-windows", tiny_folder, *common, *recall, *more, "--json", "--out", tmp_path / "sizes.json")
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    ids, weights = evaluate.recall_sequences(text_file, tokenizer, 150, 2, distances=(12, 20), share=0.5)
    teacher, spec = AutoModelForCausalLM.from_pretrained(tiny_folder), lz.Heavy(window=8, heavy=8)
    expected = lz.select_windows(
        teacher, ids, layers=spec, weights=weights, field=("window", "heavy"), octaves=1, rounds=2
    )
    assert read_layers(str(tmp_path / "sizes.json"), None, 3) == list(expected)
    assert found["sizes"] == expected.to_dict()["sizes"]
    assert found["curve"] == pytest.approx(expected.curve)
    for command, options in (("select-windows", ()), ("select-layers", ("--keep", 1))):
        arguments = (*options, "--text", text_file, "--length", 48, "--limit", 1, "--out", tmp_path / "other.json")
        error = fail(command, tiny_folder, *arguments, "--recall-share", 0.5)
        assert "--recall-share 0.5 says what answers count; say with --recall TOKENS how far back they lie" in error


def test_select_layers_says_what_is_wrong(student_folder, text_file, tmp_path):
    common = ("select-layers", student_folder, "--text", text_file, "--length", 48, "--limit", 1)
    assert "end it in .json" in fail(*common, "--keep", 1, "--out", tmp_path / "layers.txt")
    assert "from 1 (layers that have softmax already) to 3" in fail(*common, "--keep", 4, "--out", tmp_path / "a.json")
    assert left_behind(tmp_path) == ["text.txt"]


# --- generate


def test_generate_streams_what_the_model_says(student_folder, tiny_folder):
    model, tokenizer = lz.from_pretrained(student_folder), AutoTokenizer.from_pretrained(tiny_folder)
    ids = tokenizer("The lizard", return_tensors="pt")["input_ids"]
    said = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    expected = tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)
    assert expected.strip()
    arguments = ("generate", student_folder, "The lizard", "--max-new-tokens", 12)
    assert succeed(*arguments, "--no-chat").strip() == expected.strip()
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "The lizard"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )["input_ids"]
    said = model.generate(asked, max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    answer = tokenizer.decode(said[0, asked.shape[1] :], skip_special_tokens=True)
    assert succeed(*arguments).strip() == succeed(*arguments, "--chat").strip() == answer.strip()


def test_a_seed_repeats_a_sample(student_folder):
    say = lambda seed: succeed(  # noqa: E731
        "generate",
        student_folder,
        "The",
        "--no-chat",
        "--temperature",
        1.5,
        "--max-new-tokens",
        16,
        "--seed",
        seed,
    )
    assert say(1) == say(1) != say(2)


def test_generate_says_what_is_wrong(student_folder, tmp_path):
    assert "the prompt is empty" in fail("generate", student_folder, "", "--no-chat")
    bare = tmp_path / "bare"
    shutil.copytree(student_folder, bare)
    for template in bare.glob("chat_template*"):
        template.unlink()
    assert "has no chat template; use --no-chat" in fail("generate", bare, "Hello", "--chat")


# --- distill


@pytest.fixture
def recipe_file(tmp_path):
    recipe = Recipe(
        name="tiny",
        transfer=Stage(steps=2, batch_size=2, sequence_length=32),
        finetune=Finetune(steps=2, batch_size=2, sequence_length=32),
    )
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(recipe.to_dict()))
    return path


def test_distill_writes_both_stages(student_folder, tiny_folder, text_file, recipe_file, tmp_path):
    packed = tmp_path / "more.txt.gz"
    packed.write_bytes(gzip.compress(TEXT.encode()))
    out = succeed(
        "distill", student_folder, "--data", text_file, "--data", packed, "--recipe", recipe_file,
        "--teacher", tiny_folder, "--out", tmp_path / "run",
    )  # fmt: skip
    for name in ("transfer", "final", "log.jsonl", "loss.png", "layer_error.png"):
        assert f"wrote {tmp_path / 'run' / name}" in out
        assert (tmp_path / "run" / name).exists()
    before, after = lz.from_pretrained(student_folder), lz.from_pretrained(tmp_path / "run" / "final")
    changed = {name for name, value in after.state_dict().items() if not torch.equal(value, before.state_dict()[name])}
    assert any(".mixer." in name for name in changed)
    assert any(name.endswith("q_proj.weight") for name in changed)
    assert not any(".mlp." in name for name in changed)
    again = (
        "distill",
        student_folder,
        "--data",
        text_file,
        "--recipe",
        recipe_file,
        "--out",
        tmp_path / "run",
    )
    assert "is not empty" in fail(*again)
    assert "was started with another" in fail(*again, "--resume")


def test_distill_runs_one_stage(student_folder, text_file, recipe_file, tmp_path):
    succeed(
        "distill", student_folder, "--data", text_file, "--recipe", recipe_file, "--stage", "transfer",
        "--out", tmp_path / "run",
    )  # fmt: skip
    assert (tmp_path / "run" / "transfer").is_dir()
    assert not (tmp_path / "run" / "final").exists()


def test_distill_of_what_is_recommended_goes_straight_to_stage_2(tiny_folder, text_file, recipe_file, tmp_path):
    succeed("linearize", tiny_folder, "--out", tmp_path / "student")
    run = ("distill", tmp_path / "student", "--data", text_file, "--recipe", recipe_file, "--out", tmp_path / "run")
    assert 'pass stages=["finetune"]' in fail(*run, "--stage", "transfer")
    code, out, err = lizardzoo(*run)
    assert code == 0
    assert "so the stage transfer has nothing to train: it is left out" in err
    assert f"wrote {tmp_path / 'run' / 'final'}" in out
    assert not (tmp_path / "run" / "transfer").exists()
    assert f"wrote {tmp_path / 'run' / 'final'}" in succeed(*run, "--resume")


def test_distill_says_what_is_wrong(student_folder, tiny_folder, text_file, tmp_path):
    def error(*arguments, model=student_folder):
        return fail("distill", model, *arguments, "--out", tmp_path / "out")

    assert "is not linearized; run `lizardzoo linearize" in error("--data", text_file, model=tiny_folder)
    assert "unknown recipe 'lizzard'" in error("--data", text_file, "--recipe", "lizzard")
    assert "there is no recipe file" in error("--data", text_file, "--recipe", tmp_path / "no.json")
    (tmp_path / "bad.json").write_text("{")
    assert "is not JSON" in error("--data", text_file, "--recipe", tmp_path / "bad.json")
    assert "there is no such file" in error("--data", tmp_path / "no.txt")
    assert left_behind(tmp_path) == ["bad.json", "text.txt"]
