"""The tokenizer: exact round trips, literal special tokens, small vocabularies and Hugging Face folders."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Core
from tokenizers import decoders, models, pre_tokenizers, trainers

from tidar_mega.data import DataError
from tidar_mega.data.tokenizer import END, MASK, PAD, Tokenizer

WORDS = ["def read(self):\n    return self.value\n", "naïve café — 日本語 🎉", "aaaa bbbb aaaa 1234 1234"] * 20
TEXTS = st.text(alphabet=st.characters(codec="utf-8"), max_size=80)


@pytest.fixture(scope="module", params=[259, 300], ids=["bytes", "bpe"])
def tokenizer(request):
    return Tokenizer.train(iter(WORDS), request.param)


@given(text=TEXTS)
@example("")
@example("\x00 \r\n\t  \ufeff<|mask|>")
@example("e\u0301 \u00e9 \U0010ffff")
def test_round_trip_is_exact(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode("utf-8"))
    assert not {tokenizer.eod, tokenizer.pad, tokenizer.mask} & set(ids)


@given(pieces=st.lists(st.sampled_from([END, PAD, MASK, "<|", "mask", "a", " "]), max_size=8))
def test_a_literal_special_token_is_text(tokenizer, pieces):
    text = "".join(pieces)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert not {tokenizer.eod, tokenizer.pad, tokenizer.mask} & set(tokenizer.encode(text))


@given(texts=st.lists(TEXTS, min_size=1, max_size=5))
def test_a_batch_is_the_same_as_one_by_one(tokenizer, texts):
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(t) for t in texts]


def test_special_tokens_are_three_ids_without_bytes(tokenizer):
    special = [tokenizer.eod, tokenizer.pad, tokenizer.mask]
    assert sorted(special) == list(range(tokenizer.vocab_size - 3, tokenizer.vocab_size))
    assert tokenizer.token_bytes[special].tolist() == [0, 0, 0]
    assert tokenizer.token_bytes.shape == (tokenizer.vocab_size,)
    assert tokenizer.token_bytes.dtype == np.int64
    assert (np.delete(tokenizer.token_bytes, special) > 0).all()
    assert tokenizer.decode([*tokenizer.encode("ab"), *special]) == "ab"


def test_a_cut_character_decodes_to_the_replacement_character(tokenizer):
    ids = Tokenizer.train(iter([]), 259).encode("é")
    assert Tokenizer.train(iter([]), 259).decode(ids[:1]) == "\ufffd"


def test_bytes_alone_are_a_vocabulary():
    tokenizer = Tokenizer.train(iter(WORDS), 259)
    assert tokenizer.vocab_size == 259
    assert len(tokenizer.encode("日本")) == 6


def test_a_vocabulary_below_the_bytes_is_refused():
    with pytest.raises(DataError, match="--vocab-size 258: at least 259"):
        Tokenizer.train(iter(WORDS), 258)


def test_save_and_load_are_the_same_tokenizer(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    assert again.encode(WORDS[0] + MASK) == tokenizer.encode(WORDS[0] + MASK)
    assert (again.eod, again.pad, again.mask) == (tokenizer.eod, tokenizer.pad, tokenizer.mask)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tidar_tokenizer.json", "tokenizer.json"]


def test_fingerprints_tell_tokenizers_apart():
    prints = {Tokenizer.train(iter(WORDS), size).fingerprint for size in (259, 270, 300)}
    prints.add(Tokenizer.train(iter(["other words other words"] * 9), 270).fingerprint)
    assert len(prints) == 4


def test_training_is_the_same_in_another_process_with_another_number_of_threads():
    code = (
        "from tidar_mega.data.tokenizer import Tokenizer; from tests.test_data_tokenizer import WORDS; "
        "print(Tokenizer.train(iter(WORDS), 300).fingerprint)"
    )
    root = Path(__file__).parent.parent
    for threads in ("1", "3"):
        made = subprocess.run(
            [sys.executable, "-c", code],
            cwd=root,
            env={"RAYON_NUM_THREADS": threads},
            capture_output=True,
            text=True,
            check=True,
        )
        assert made.stdout.strip() == Tokenizer.train(iter(WORDS), 300).fingerprint


def train_core() -> Core:
    core = Core(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        iter(WORDS), trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    )
    return core


@pytest.fixture
def hf_core():
    return train_core()


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    core = train_core()
    write_gpt2_style(core, folder)
    return core, Tokenizer.load(folder)


def write_gpt2_style(core: Core, folder) -> None:
    """vocab.json, in which the end-of-document token is an ordinary entry, and merges.txt."""
    tree = json.loads(core.to_str())["model"]
    vocab = {**tree["vocab"], "<|endoftext|>": len(tree["vocab"])}
    merges = [m if isinstance(m, str) else " ".join(m) for m in tree["merges"]]
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")


@given(text=TEXTS)
@example("<|endoftext|><|mask|>")
def test_gpt2_files(hf_folder, text):
    core, tokenizer = hf_folder
    assert tokenizer.encode(text) == core.encode(text).ids
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_gpt2_files_get_the_tokens_that_they_lack(hf_folder):
    core, tokenizer = hf_folder
    assert (tokenizer.eod, tokenizer.pad, tokenizer.mask) == (290, 291, 292)
    assert tokenizer.not_text == {291, 292}
    assert tokenizer.vocab_size == core.get_vocab_size() + 3
    assert tokenizer.token_bytes[[290, 291, 292]].tolist() == [0, 0, 0]


def test_qwen_files(hf_core, tmp_path):
    write_gpt2_style(hf_core, tmp_path)
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    del vocab["<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    added = ["<|endoftext|>", "<think>", "<MASK>"]
    (tmp_path / "added_tokens.json").write_text(json.dumps({t: 290 + i for i, t in enumerate(added)}))
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    config["additional_special_tokens"] = ["<MASK>"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.eod, tokenizer.pad, tokenizer.mask, tokenizer.vocab_size) == (290, 290, 292, 293)
    assert tokenizer.not_text == {292}  # a document must be able to end
    assert 291 in tokenizer.encode("<think>") and tokenizer.token_bytes[291] == len("<think>")
    assert 292 not in tokenizer.encode("<MASK>")
    assert tokenizer.decode(tokenizer.encode("e\u0301")) == "\u00e9"  # Qwen's normaliser composes
    assert len(tokenizer.encode("1234")) == 4  # Qwen's word splitter takes digits one by one
    tokenizer.save(tmp_path / "saved")
    assert Tokenizer.load(tmp_path / "saved").fingerprint == tokenizer.fingerprint


def test_a_tokenizer_json_of_another_program(hf_core, tmp_path):
    hf_core.add_special_tokens(["</s>", "[MASK]"])
    hf_core.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.eod, tokenizer.mask, tokenizer.pad) == (290, 291, 292)


def test_a_folder_without_end_of_document_is_refused(hf_core, tmp_path):
    hf_core.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="no end-of-document token.*eos_token"):
        Tokenizer.load(tmp_path)


def test_a_tokenizer_without_all_bytes_is_refused(tmp_path):
    core = Core(models.BPE())
    core.train_from_iterator(iter(WORDS), trainers.BpeTrainer(vocab_size=50, show_progress=False))
    core.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="only byte-level BPE"):
        Tokenizer.load(tmp_path)


def test_damaged_folders_are_refused(tokenizer, tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        Tokenizer.load(tmp_path / "none")
    with pytest.raises(DataError, match="neither tokenizer.json nor vocab.json"):
        Tokenizer.load(tmp_path)
    tokenizer.save(tmp_path)
    whole = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="damaged"):
        Tokenizer.load(tmp_path)


def test_files_of_two_tokenizers_are_refused(tmp_path):
    Tokenizer.train(iter(WORDS), 300).save(tmp_path / "a")
    Tokenizer.train(iter(WORDS), 259).save(tmp_path / "b")
    shutil.copy(tmp_path / "a" / "tokenizer.json", tmp_path / "b")
    with pytest.raises(DataError, match="not of one tokenizer"):
        Tokenizer.load(tmp_path / "b")
