"""A byte-level BPE tokenizer with end-of-document, padding and mask tokens, trained here or taken from a HF folder.

Text is always encoded as text: the literal characters "<|mask|>" in a document become the bytes of these characters,
never the mask id. Byte-level BPE: Radford et al. 2019 (GPT-2), section 2.2.

Shape suffixes: V ids of the vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from tidar_mega.config.errors import storage_error
from tidar_mega.data import DataError

END, PAD, MASK = "<|endofdoc|>", "<|pad|>", "<|mask|>"
SMALLEST_VOCAB = 256 + 3  # every byte and the three reserved tokens
MODEL_FILE, SPECIALS_FILE = "tokenizer.json", "tidar_tokenizer.json"

_ROLES = ("end_of_document", "padding", "mask")
_KNOWN_MASKS = ("<MASK>", "<|mask|>", "<|MASK|>", "<mask>", "[MASK]")
# The word splitter of Qwen2 and Qwen3, from their published tokenizer.json.
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
    """Text <-> ids. `eod`, `pad` and `mask` are ids that no text ever encodes to."""

    def __init__(self, core: tokenizers.Tokenizer, specials: dict[str, str]) -> None:
        """`specials`: the token of each role in `_ROLES`, all of them in the vocabulary of `core`."""
        core.encode_special_tokens = True  # special tokens in a text are text
        core.no_padding()
        core.no_truncation()
        self._core = core
        self._specials = specials
        self.eod, self.pad, self.mask = (core.token_to_id(specials[role]) for role in _ROLES)

    @property
    def not_text(self) -> frozenset[int]:
        """The ids that a model must neither read as text nor write. The end of a document is both, also where it is the
        padding token as well (the base models of Qwen)."""
        return frozenset((self.pad, self.mask)) - {self.eod}

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """A new BPE of at most `vocab_size` ids: 256 bytes, merges learnt from `texts`, then the reserved tokens.

        Fewer ids than asked when `texts` has no more pairs that occur twice. Raises DataError if `vocab_size` is
        below 259.
        """
        check_vocab_size(vocab_size)
        core = tokenizers.Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        core.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 3,
            min_frequency=2,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        core.train_from_iterator(texts, trainer)
        core.add_special_tokens([_special(token) for token in (END, PAD, MASK)])
        return cls(core, dict(zip(_ROLES, (END, PAD, MASK), strict=True)))

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Reads a folder made by `save`, or the tokenizer files of a Hugging Face model. Raises DataError.

        Of a Hugging Face folder: the end-of-document token is its eos_token, else <|endoftext|>; a mask or padding
        token that it lacks is added at the end of the vocabulary.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise DataError(f"tokenizer folder {folder}: no such folder")
        if (folder / SPECIALS_FILE).is_file():
            return _load_own(cls, folder)
        core = _read_model(folder)
        return cls(core, _find_specials(core, folder))

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json and, as the mark of a whole folder, tidar_tokenizer.json."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        specials = {r: {"token": t, "id": self._core.token_to_id(t)} for r, t in self._specials.items()}
        _write(folder / MODEL_FILE, self._core.to_str(pretty=False))
        _write(folder / SPECIALS_FILE, json.dumps({"version": 1, "vocab_size": self.vocab_size, **specials}, indent=1))

    @property
    def transformers_config(self) -> dict:
        """What tokenizer_config.json must say beside tokenizer.json, for Hugging Face's AutoTokenizer."""
        names = {"end_of_document": "eos_token", "padding": "pad_token", "mask": "mask_token"}
        tokens = {names[role]: token for role, token in self._specials.items()}
        return {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **tokens}

    def encode(self, text: str) -> list[int]:
        return self._core.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self._core.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The UTF-8 bytes of the ids; special tokens have none. A part of a text may end inside a character."""
        return b"".join(self._pieces[i] for i in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids, without special tokens; broken UTF-8 (a text cut inside a character) becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    @cached_property
    def vocab_size(self) -> int:
        """Largest id + 1."""
        return max(self._core.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """int64 [V]: UTF-8 bytes of every id, 0 for special tokens."""
        return np.array([len(piece) for piece in self._pieces], dtype=np.int64)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of all that decides how text becomes ids; the same for every version of the library."""
        tree = json.loads(self._core.to_str())
        merges = [m if isinstance(m, str) else " ".join(m) for m in tree["model"]["merges"]]
        added = [(t["id"], t["content"], t["special"]) for t in tree["added_tokens"]]
        parts = [tree["model"]["vocab"], merges, added, tree["normalizer"], tree["pre_tokenizer"], self._specials]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @cached_property
    def _pieces(self) -> list[bytes]:
        byte_of = {c: bytes([b]) for b, c in _byte_alphabet().items()}
        pieces = [b""] * self.vocab_size
        for token, i in self._core.get_vocab(with_added_tokens=False).items():
            pieces[i] = b"".join(byte_of.get(c) or c.encode() for c in token)
        for i, token in self._core.get_added_tokens_decoder().items():
            pieces[i] = b"" if token.special else token.content.encode()
        return pieces


def check_vocab_size(vocab_size: int) -> None:
    if vocab_size < SMALLEST_VOCAB:
        raise DataError(
            f"--vocab-size {vocab_size}: at least {SMALLEST_VOCAB} entries are needed "
            "(256 bytes and the end-of-document, padding and mask tokens)"
        )


def _byte_alphabet() -> dict[int, str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {b: chr(b) for b in printable}
    for b in range(256):
        if b not in table:
            table[b] = chr(256 + len(table) - len(printable))
    return table


def _special(token: str) -> AddedToken:
    return AddedToken(token, special=True, normalized=False)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _load_own(cls, folder: Path) -> Tokenizer:
    core = _read_model(folder)
    tree = _read_json(folder / SPECIALS_FILE)
    try:
        specials = {role: tree[role]["token"] for role in _ROLES}
        ids = {role: tree[role]["id"] for role in _ROLES}
    except (KeyError, TypeError):
        raise DataError(f"{folder / SPECIALS_FILE}: it must name {', '.join(_ROLES)}; {_AGAIN}") from None
    for role, token in specials.items():
        if core.token_to_id(token) != ids[role]:
            raise DataError(
                f"{folder / SPECIALS_FILE}: {role} is {token!r} with id {ids[role]}, but {MODEL_FILE} beside it gives "
                f"{core.token_to_id(token)}: the two files are not of one tokenizer; {_AGAIN}"
            )
    return cls(core, specials)


_AGAIN = "take the whole folder from its origin again, or run `tidar prepare` again"


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}); {_AGAIN}") from None
    except OSError as error:
        said = f"{path}: cannot be read ({error})"
        raise storage_error(error, DataError, said, "make it readable for this user") from None


def _read_model(folder: Path) -> tokenizers.Tokenizer:
    """The byte-level BPE of tokenizer.json, or of vocab.json and merges.txt."""
    try:
        if (folder / MODEL_FILE).is_file():
            core = tokenizers.Tokenizer.from_file(str(folder / MODEL_FILE))
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            core = _from_vocab_and_merges(folder)
        else:
            raise DataError(f"tokenizer folder {folder}: it has neither {MODEL_FILE} nor vocab.json with merges.txt")
    except DataError:
        raise
    except Exception as error:  # the library raises bare Exception for damaged files
        raise DataError(f"tokenizer folder {folder}: damaged or of another kind ({error}); {_AGAIN}") from None
    _require_byte_level(core, folder)
    return core


def _require_byte_level(core: tokenizers.Tokenizer, folder: Path) -> None:
    vocab = core.get_vocab(with_added_tokens=False)
    missing = [b for b, c in _byte_alphabet().items() if c not in vocab]
    if not isinstance(core.model, models.BPE) or missing:
        raise DataError(
            f"tokenizer folder {folder}: {type(core.model).__name__}, {len(missing)} of the 256 bytes without an id; "
            "only byte-level BPE can encode any text (GPT-2, Llama 3, Qwen and similar)"
        )


def _from_vocab_and_merges(folder: Path) -> tokenizers.Tokenizer:
    config = _config(folder)
    core = tokenizers.Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    if str(config.get("tokenizer_class", "")).startswith("Qwen2Tokenizer"):
        core.normalizer = normalizers.NFC()
        words = pre_tokenizers.Split(Regex(_QWEN2_WORDS), behavior="isolated", invert=False)
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        core.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
    else:
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    core.decoder = decoders.ByteLevel()
    _add_tokens(core, folder, config)
    return core


def _config(folder: Path) -> dict:
    """special_tokens_map.json under tokenizer_config.json, which says more."""
    names = ("special_tokens_map.json", "tokenizer_config.json")
    found = [_read_json(folder / name) for name in names if (folder / name).is_file()]
    return {key: value for tree in found for key, value in tree.items()}


def _add_tokens(core: tokenizers.Tokenizer, folder: Path, config: dict) -> None:
    """Adds what added_tokens_decoder and, for other ids, the older added_tokens.json list, with the ids they give."""
    path = folder / "added_tokens.json"
    tokens = {i: token for token, i in (_read_json(path) if path.is_file() else {}).items()}
    flags = {}
    for i, entry in config.get("added_tokens_decoder", {}).items():
        tokens[int(i)] = entry["content"]
        flags[entry["content"]] = entry.get("special", False)
    named = {_content(config.get(f"{name}_token")) for name in ("eos", "bos", "pad", "unk", "mask")}
    named |= {_content(token) for token in config.get("additional_special_tokens", [])}
    for i, token in sorted(tokens.items()):
        special = flags.get(token, False) or token in named
        core.add_tokens([AddedToken(token, special=special, normalized=False)])
        if core.token_to_id(token) != i:
            raise DataError(
                f"tokenizer folder {folder}: added token {token!r} has id {i}, but the next free id is "
                f"{core.token_to_id(token)}: vocab.json and the list of added tokens do not belong together"
            )


def _content(token: str | dict | None) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _find_specials(core: tokenizers.Tokenizer, folder: Path) -> dict[str, str]:
    """The tokens of our three roles; those that the folder lacks are added."""
    config = _config(folder)
    eod = _first(core, [_content(config.get("eos_token")), "<|endoftext|>"])
    if eod is None:
        raise DataError(
            f"tokenizer folder {folder}: no end-of-document token; name one as eos_token in its tokenizer_config.json"
        )
    mask = _first(core, [_content(config.get("mask_token")), *_KNOWN_MASKS]) or MASK
    pad = _first(core, [_content(config.get("pad_token")), "<|pad|>", "<pad>", "[PAD]"]) or PAD
    if mask in (eod, pad):
        raise DataError(f"tokenizer folder {folder}: the mask token {mask!r} has another role too; name a free one")
    core.add_special_tokens([_special(token) for token in dict.fromkeys((eod, pad, mask))])
    return dict(zip(_ROLES, (eod, pad, mask), strict=True))


def _first(core: tokenizers.Tokenizer, candidates: list[str | None]) -> str | None:
    return next((c for c in candidates if c is not None and core.token_to_id(c) is not None), None)
