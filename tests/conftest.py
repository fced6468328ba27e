"""Fixtures for all tests: an offline environment, hypothesis profiles, a tiny Llama, the real small teacher.

`HYPOTHESIS_PROFILE=explore make test` looks for new counter-examples; the default profile is deterministic.
"""

import gc
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

# Before anything imports huggingface_hub, which reads these once: no test may depend on a network, and none
# may leave files in the user's caches.
_USER_ENVIRONMENT = dict(os.environ)
_CACHE = tempfile.mkdtemp(prefix="lizardzoo-tests-")
os.environ.update(
    HF_HOME=_CACHE,
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
)
for _name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_ASSETS_CACHE"):  # they would win over HF_HOME
    os.environ.pop(_name, None)

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from transformers import (  # noqa: E402
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

# deadline=None everywhere: the first example pays for lazy imports, and no test asserts on time.
_SLOW_DRAWS = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile(
    "ci", max_examples=30, derandomize=True, deadline=None, print_blob=True, suppress_health_check=_SLOW_DRAWS
)
settings.register_profile(
    "explore", max_examples=500, deadline=None, print_blob=True, suppress_health_check=_SLOW_DRAWS
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

torch.set_num_threads(1)  # the tests run in several processes; the models are too small to share out

VOCABULARY = 300
BOS, EOS, PAD = "<|im_start|>", "<|im_end|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def pytest_collection_finish() -> None:
    """All modules are there, and stay: no collection has to walk through them again, of the many that tests ask for."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A GPU test on a machine without one fails: a skip would let `make test-gpu` pass and prove nothing."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.fail("marked gpu, and torch finds no CUDA device here", pytrace=False)


def pytest_unconfigure() -> None:
    gc.unfreeze()  # what is frozen would not be taken down at the end, and libraries say so
    shutil.rmtree(_CACHE, ignore_errors=True)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test draws the same numbers, alone or in any order."""
    torch.manual_seed(0)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 300 words, learnt from the licence alone; any text goes there and back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    prose = Path(__file__).parents[1] / "LICENSE"  # a text that nobody edits
    tokenizer.train_from_iterator(prose.read_text(encoding="utf-8").splitlines(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def make_llama() -> LlamaForCausalLM:
    """A random Llama of 3 layers, fp32, in eval mode; always the same weights."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,  # 4 * 16 != 48: code that takes head_dim for hidden / heads breaks here
        max_position_embeddings=512,
        initializer_range=0.15,  # attention scores of about 1; with 0.02 every head would be uniform
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
        dtype=torch.float32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


@pytest.fixture
def tiny_llama() -> LlamaForCausalLM:
    """A fresh random Llama: 3 layers, hidden 48, 4 heads, 2 key-value heads of 16, vocabulary 300."""
    return make_llama()


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer for `tiny_llama`, with bos, eos, pad and a chat template."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_llama` and `tiny_tokenizer` as a saved Hugging Face folder; read it, never write into it."""
    folder = tmp_path_factory.mktemp("tiny") / "llama"
    make_llama().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct in fp32 and its tokenizer, shared by the session: leave both as they are.

    The first use on a machine fetches it, in a process of its own with the user's environment, because this
    one is offline; later uses find it in lizardzoo's cache folder.
    """
    fetch = "from lizardzoo.smollm2 import teacher_folder; teacher_folder()"
    result = subprocess.run(
        [sys.executable, "-c", fetch],
        env=_USER_ENVIRONMENT,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        pytest.fail(f"SmolLM2-135M-Instruct could not be fetched:\n{result.stderr}", pytrace=False)
    from lizardzoo.smollm2 import load_teacher

    return load_teacher()


@pytest.fixture
def script(monkeypatch):
    """Imports a module of benchmarks/ as a script there finds its neighbours; all of them are forgotten afterwards."""
    folder = Path(__file__).parents[1] / "benchmarks"
    monkeypatch.syspath_prepend(folder)
    yield importlib.import_module
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "").parent == folder:
            del sys.modules[name]
