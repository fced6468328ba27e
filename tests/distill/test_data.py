"""Packing: nothing is lost or invented, documents are told apart, and a wrong source gets one sentence."""

import gzip
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lizardzoo.distill.data import fingerprint, load_data
from lizardzoo.errors import LizardzooError

TEXTS = [f"Document {i} is {'very ' * (i % 5)}short." for i in range(20)]


def documents_in(dataset, tokenizer):
    """The texts between the EOS tokens of all rows, in order."""
    stream = [token for row in dataset["input_ids"] for token in row]
    texts, current = [], []
    for token in stream:
        if token == tokenizer.eos_token_id:
            texts.append(tokenizer.decode(current))
            current = []
        else:
            current.append(token)
    return texts


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(min_size=1), min_size=1, max_size=12), seed=st.integers(0, 99))
def test_one_long_row_holds_every_document_once(texts, seed, tiny_tokenizer):
    texts = [text for text in texts if text.strip()]
    total = sum(len(tiny_tokenizer(text, add_special_tokens=False)["input_ids"]) + 1 for text in texts)
    if total < 2:
        return
    data = load_data(texts, tiny_tokenizer, total, seed=seed)
    assert len(data) == 1
    assert sorted(documents_in(data, tiny_tokenizer)) == sorted(texts)


@pytest.mark.parametrize("length", [2, 7, 32])
def test_rows_are_full_and_only_the_rest_is_dropped(length, tiny_tokenizer):
    data = load_data(TEXTS, tiny_tokenizer, length)
    total = sum(len(ids) + 1 for ids in tiny_tokenizer(TEXTS, add_special_tokens=False)["input_ids"])
    assert len(data) == total // length
    assert {len(row) for row in data["input_ids"]} == {length}
    assert data.column_names == ["input_ids"]


def test_the_seed_decides_the_order_and_nothing_else(tiny_tokenizer):
    first, again, other = (load_data(TEXTS, tiny_tokenizer, 16, seed=seed) for seed in (3, 3, 4))
    assert first["input_ids"][:] == again["input_ids"][:]
    assert fingerprint(first) == fingerprint(again) != fingerprint(other)


def test_the_fingerprint_sees_every_token_and_the_positions(tiny_tokenizer):
    plain = load_data(TEXTS, tiny_tokenizer, 16)
    isolated = load_data(TEXTS, tiny_tokenizer, 16, isolate_documents=True)
    assert plain["input_ids"][:] == isolated["input_ids"][:]
    rows = np.array(plain["input_ids"])
    rows[-1, -1] += 1
    changed = datasets.Dataset.from_dict({"input_ids": rows})
    assert len({fingerprint(plain), fingerprint(isolated), fingerprint(changed)}) == 3
    wider = plain.cast_column("input_ids", datasets.List(datasets.Value("int64")))
    assert fingerprint(wider) == fingerprint(plain)


def test_positions_restart_after_every_eos_and_nowhere_else(tiny_tokenizer):
    data = load_data(TEXTS, tiny_tokenizer, 24, isolate_documents=True)
    for row in data:
        expected, position = [], 0
        for token in row["input_ids"]:
            expected.append(position)
            position = 0 if token == tiny_tokenizer.eos_token_id else position + 1
        assert row["position_ids"] == expected


def test_a_tokenizer_that_begins_with_bos_begins_every_document_with_it(tiny_tokenizer):
    from tokenizers.processors import TemplateProcessing

    bos, eos = tiny_tokenizer.bos_token_id, tiny_tokenizer.eos_token_id
    tiny_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", bos)]
    )
    tokens = load_data(["abc"], tiny_tokenizer, 2)["input_ids"][0]
    assert tokens[0] == bos
    total = len(tiny_tokenizer("abc")["input_ids"]) + 1
    assert load_data(["abc"], tiny_tokenizer, total)["input_ids"][0] == [
        *tiny_tokenizer("abc")["input_ids"],
        eos,
    ]


def write(path: Path, text: str) -> Path:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_files_give_what_their_texts_give(suffix, tmp_path, tiny_tokenizer):
    expected = load_data(TEXTS[:1], tiny_tokenizer, 8)["input_ids"][:]
    text = write(tmp_path / f"a.txt{suffix}", TEXTS[0])
    lines = write(tmp_path / f"a.jsonl{suffix}", json.dumps({"text": TEXTS[0]}) + "\n\n")
    for source in (text, str(text), [text], lines, [str(lines)]):
        assert load_data(source, tiny_tokenizer, 8)["input_ids"][:] == expected
    both = load_data([text, lines], tiny_tokenizer, 8)
    assert len(both) == 2 * len(tiny_tokenizer(TEXTS[0] + "<|im_end|>")["input_ids"]) // 8


def test_instructions_become_alpacas_prompt(tmp_path, tiny_tokenizer):
    rows = [
        {"instruction": "Add.", "input": "1, 2", "output": "3", "source": "x"},
        {"instruction": "Greet.", "input": "", "output": "Hello"},
        {"instruction": "Greet again.", "output": "Hello"},
    ]
    path = write(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, rows)))
    texts = []
    for source in (path, datasets.Dataset.from_list(rows)):
        total = sum(len(tiny_tokenizer(t)["input_ids"]) + 1 for t in texts) or 10
        data = load_data(source, tiny_tokenizer, total)
        texts = texts or [
            "Below is an instruction that describes a task, paired with an input that provides further "
            "context. Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nAdd.\n\n"
            "### Input:\n1, 2\n\n### Response:\n3",
            *(
                "Below is an instruction that describes a task. Write a response that appropriately "
                f"completes the request.\n\n### Instruction:\n{words}\n\n### Response:\nHello"
                for words in ("Greet.", "Greet again.")
            ),
        ]
    assert sorted(documents_in(data, tiny_tokenizer)) == sorted(texts)


def test_equal_mixing_takes_as_much_of_each_source(tmp_path, tiny_tokenizer):
    few = write(tmp_path / "few.txt", "a" * 50)
    many = write(tmp_path / "many.txt", "z" * 500)
    letters = {letter: tiny_tokenizer(letter)["input_ids"][0] for letter in "az"}
    alone = len(load_data(few, tiny_tokenizer, 8))
    data = load_data([few, many], tiny_tokenizer, 8, mixing="equal")
    assert len(data) == 2 * alone
    assert sum(letters["a"] in row for row in data["input_ids"]) == alone
    everything = load_data([few, many], tiny_tokenizer, 8)
    assert len(everything) > len(data)


def test_a_dataset_is_found_by_name_and_split(tmp_path, monkeypatch, tiny_tokenizer):
    folder = tmp_path / "org" / "name"
    folder.mkdir(parents=True)
    write(folder / "train.jsonl", json.dumps({"text": TEXTS[0]}))
    write(folder / "test.jsonl", json.dumps({"text": TEXTS[1]}))
    monkeypatch.chdir(tmp_path)
    for name, text in (("org/name", TEXTS[0]), ("org/name:test", TEXTS[1])):
        found = load_data(name, tiny_tokenizer, 8)["input_ids"][:]
        assert found == load_data([text], tiny_tokenizer, 8)["input_ids"][:]


def test_packed_data_is_taken_as_it_is(tiny_tokenizer):
    packed = load_data(TEXTS, tiny_tokenizer, 16, isolate_documents=True)
    assert load_data(packed, tiny_tokenizer, 16, isolate_documents=True)[:] == packed[:]
    assert load_data(packed, tiny_tokenizer, 16).column_names == ["input_ids"]
    with pytest.raises(LizardzooError, match=r"rows of \[16\] tokens, the recipe wants input_ids with 32"):
        load_data(packed, tiny_tokenizer, 32)
    plain = load_data(TEXTS, tiny_tokenizer, 16)
    with pytest.raises(LizardzooError, match="wants input_ids and position_ids"):
        load_data(plain, tiny_tokenizer, 16, isolate_documents=True)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.txt", None, "no such file"),
        ("table.csv", "a,b", "data files end in .txt"),
        ("short.txt", "Hi.", "tokens of text are fewer than one sequence of 64; give more text"),
        ("blank.jsonl", '{"text": " "}\n', "0 tokens of text"),
        ("bad.jsonl", '{"text": "a"}\n{oops}\n', "bad.jsonl: cannot be read"),
        ("list.jsonl", "[1, 2]\n", 'line 1: expected columns "text", or "instruction"'),
        ("columns.jsonl", '{"text": "a"}\n{"question": "a"}\n', "line 2: expected columns"),
        ("types.jsonl", '{"text": 3}\n', "that hold strings"),
        ("half.jsonl", '{"instruction": "a"}\n', "line 1: expected columns"),
        ("cut.txt.gz", b"\x1f\x8b\x08\x00", "cannot be read"),
        ("plain.txt.gz", b"not gzip", "cannot be read"),
        ("latin.txt", b"\xff\xfe\xe9", "cannot be read"),
    ],
)
def test_a_bad_file_gets_one_sentence_that_names_it(name, content, words, tmp_path, tiny_tokenizer):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(LizardzooError, match=name) as error:
        load_data(path, tiny_tokenizer, 64)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("source", ["a text that is no list", "", [], [3], b"bytes", None, {"text": "a"}])
def test_a_source_that_is_none_lists_what_may_be_given(source, tiny_tokenizer):
    with pytest.raises(LizardzooError, match=r"data is a file|files or texts, not both"):
        load_data(source, tiny_tokenizer, 8)


def test_files_and_texts_are_not_mixed(tmp_path, tiny_tokenizer):
    path = write(tmp_path / "a.txt", "text")
    with pytest.raises(LizardzooError, match="files or texts, not both"):
        load_data([path, "a text"], tiny_tokenizer, 2)


def test_wrong_columns_of_a_dataset_are_named(tiny_tokenizer):
    rows = datasets.Dataset.from_dict({"question": ["a"], "answer": ["b"]})
    with pytest.raises(LizardzooError, match=r"the dataset, row 0: expected columns.*got question, answer"):
        load_data(rows, tiny_tokenizer, 8)


def test_an_unknown_dataset_is_named(tiny_tokenizer):
    with pytest.raises(LizardzooError, match='cannot load the dataset "nobody/nothing", split "train"') as error:
        load_data("nobody/nothing", tiny_tokenizer, 8)
    assert "\n" not in str(error.value)


def test_a_tokenizer_without_eos_is_refused(tiny_tokenizer):
    tiny_tokenizer.eos_token = None
    with pytest.raises(LizardzooError, match=r"has no EOS token.*set tokenizer.eos_token"):
        load_data(TEXTS, tiny_tokenizer, 8)
