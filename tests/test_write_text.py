"""Text that a teacher wrote: an answer for each prompt, the same whether it was stopped or not; data for distill."""

import gzip
import json

import pytest

from lizardzoo.distill import load_data


@pytest.fixture
def write_text(script):
    """benchmarks/write_text.py."""
    return script("write_text")


@pytest.fixture
def call(write_text, tiny_folder, tmp_path):
    prompts = tmp_path / "prompts.jsonl.gz"
    rows = [{"instruction": f"Name {i} lizards.", "input": "x" if i % 2 else ""} for i in range(7)]
    prompts.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))

    def run(out, *arguments):
        common = ("--prompts", prompts, "--teacher", tiny_folder, "--dtype", "float32", "--batch", 3, "--tokens", 12)
        write_text.main([*map(str, (*common, "--out", tmp_path / out, *arguments))])
        return (tmp_path / out).read_text() if (tmp_path / out).exists() else None

    return run


def test_each_prompt_is_answered_and_the_result_is_training_data(call, tiny_tokenizer, tmp_path):
    rows = [json.loads(line) for line in call("a.jsonl").splitlines()]
    assert [row["instruction"] for row in rows] == [f"Name {i} lizards." for i in range(7)]
    assert len({row["output"] for row in rows}) == 7
    assert not any("Name" in row["output"] for row in rows)
    assert len(load_data(tmp_path / "a.jsonl", tiny_tokenizer, 32)) > 0


def test_stopping_and_going_on_gives_the_same_text(call, capsys):
    whole = call("a.jsonl")
    assert call("b.jsonl", "--minutes", 0) is None
    first = call("b.jsonl", "--count", 3)
    assert whole.startswith(first)
    assert call("b.jsonl") == whole
    assert call("b.jsonl") == whole
    assert "holds all 7 answers" in capsys.readouterr().out
    assert call("c.jsonl", "--seed", 1) != whole
    call("d.jsonl", "--count", 4)
    with pytest.raises(SystemExit, match="4 answers, which is no whole number of batches"):
        call("d.jsonl")


@pytest.fixture
def alone(write_text, tiny_folder, tmp_path, monkeypatch):
    """Texts without prompts; a random model's turn ends at every tenth token or so."""
    obtain = write_text.obtain

    def ends_often(arguments):
        model, tokenizer = obtain(arguments)
        model.generation_config.eos_token_id = [2, *range(270, 300)]
        return model, tokenizer

    monkeypatch.setattr(write_text, "obtain", ends_often)

    def run(out, *arguments):
        common = ("--teacher", tiny_folder, "--dtype", "float32", "--batch", 4, "--tokens", 64, "--steps", 40)
        write_text.main([*map(str, (*common, "--out", tmp_path / out, *arguments))])
        return (tmp_path / out).read_text()

    return run


def test_a_chat_model_needs_nobodys_prompts(alone, tiny_tokenizer, tmp_path, capsys):
    rows = [json.loads(line) for line in alone("a.jsonl", "--count", 30, "--plain", 0.5).splitlines()]
    assert len(rows) >= 30
    more = alone("b.jsonl", "--count", 30, "--plain", 0.5, "--unfinished").splitlines()
    assert set(alone("a.jsonl", "--count", 30).splitlines()[:10]) < set(more)  # the same texts, and more of them
    chats = [row for row in rows if row.keys() == {"instruction", "output", "round"}]
    plain = [row for row in rows if row.keys() == {"text", "round"}]
    assert len(chats) + len(plain) == len(rows) and len(chats) > 5 and len(plain) > 5
    assert len({row["instruction"] for row in chats}) == len(chats)
    assert len(load_data(tmp_path / "a.jsonl", tiny_tokenizer, 32)) > 0
    assert f"{len(rows)} in all; dropped:" in capsys.readouterr().out


def test_rounds_go_on_as_if_they_had_not_been_stopped(alone, capsys):
    whole = alone("a.jsonl", "--count", 15)
    first = alone("b.jsonl", "--count", 1)
    assert whole.startswith(first) and first != whole
    assert alone("b.jsonl", "--count", 15) == whole
    assert alone("b.jsonl", "--count", 15) == whole
    assert f"holds {len(whole.splitlines())} texts" in capsys.readouterr().out
    assert alone("b.jsonl", "--minutes", 0) == whole
    assert "the same command goes on" in capsys.readouterr().out
    assert alone("c.jsonl", "--count", 1, "--seed", 1) != first


def test_the_template_is_cut_where_the_user_speaks(write_text, tiny_tokenizer):
    import unprompted

    script = unprompted.chat_script(tiny_tokenizer)
    assert tiny_tokenizer.decode(script.prefix) == "<|im_start|>user\n"
    assert tiny_tokenizer.decode(script.bridge) == "<|im_end|>\n<|im_start|>assistant\n"
    tiny_tokenizer.chat_template = "{{ 'Q: ' + messages[0]['content'] + ' A:' }}"
    with pytest.raises(SystemExit, match=r"no special token behind the user's turn.* --plain 1"):
        unprompted.chat_script(tiny_tokenizer)
    tiny_tokenizer.chat_template = None
    with pytest.raises(SystemExit, match="leave out --plain"):
        unprompted.chat_script(tiny_tokenizer)
    assert unprompted.start_token(tiny_tokenizer, None) == tiny_tokenizer.bos_token_id
    with pytest.raises(SystemExit, match="has no token '<s>'"):
        unprompted.start_token(tiny_tokenizer, "<s>")


def test_a_model_without_a_chat_template_writes_plain_text(alone, write_text, monkeypatch):
    obtain = write_text.obtain

    def base(arguments):
        model, tokenizer = obtain(arguments)
        tokenizer.chat_template = None
        return model, tokenizer

    monkeypatch.setattr(write_text, "obtain", base)
    rows = [json.loads(line) for line in alone("a.jsonl", "--count", 5).splitlines()]
    assert all(row.keys() == {"text", "round"} and row["text"] for row in rows)


def test_only_texts_that_are_of_use_are_taken(write_text):
    from streams import Written
    from unprompted import fault

    def judged(turns, said, whole=True, chat=True, cut=False):
        return fault(Written(0, turns, whole), said, chat, cut, {0}, {"name lizards"})

    good, chat = list(range(5, 60)), ["Why?", "So."]
    assert judged([[5, 6], good], chat) == ""
    assert judged([[5, 6], good], chat, whole=False) == "without an end"
    assert judged([[5, 6], good], chat, whole=False, cut=True) == ""
    assert judged([[5, 6]], ["Why?"], whole=False, cut=True) == "without an end"  # nobody has answered
    assert judged([good], ["So."], whole=False, chat=False) == ""  # a document may be cut
    assert judged([[5, 6], []], ["Why?", ""]) == "empty"
    assert judged([[5, 0], good], chat) == "with special tokens inside"
    assert judged([[5, 6], [7, 8, 9] * 20], chat) == "that repeat themselves"
    assert judged([[5, 6], [7, 7]], chat) == ""
    assert judged([[5, 6], good], ["Name \n Lizards", "So."]) == "asked before"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give --minutes or --count"),
        (["--count", "3", "--plain", "2"], "a share from 0 to 1, got 2.0"),
        (["--prompts", "p.jsonl", "--plain", "1"], "for texts without --prompts"),
    ],
)
def test_what_does_not_go_together_is_said(write_text, capsys, arguments, words):
    with pytest.raises(SystemExit):
        write_text.main(["--out", "x.jsonl", *arguments])
    assert words in capsys.readouterr().err


def test_what_it_cannot_write_is_said(alone, write_text, tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text('{"instruction": "Why?", "output": "So."}\n')
    with pytest.raises(SystemExit, match="without the rounds of unprompted texts; name another file"):
        alone("a.jsonl", "--count", 5)
    with pytest.raises(SystemExit, match="--tokens 8 has no room behind the template's"):
        alone("b.jsonl", "--count", 5, "--tokens", 8)
    obtain = write_text.obtain

    def sliding(arguments):
        model, tokenizer = obtain(arguments)
        model.config.sliding_window = 32
        return model, tokenizer

    monkeypatch.setattr(write_text, "obtain", sliding)
    with pytest.raises(SystemExit, match="sees 32 tokens at most, --tokens asks for 64; give --tokens 32"):
        alone("b.jsonl", "--count", 5)
