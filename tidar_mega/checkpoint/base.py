"""The weights that a run begins with (`train.init_from`): another run's checkpoint, in any layout, or a Hugging Face
model.

They may go on being trained, by any method, or stay frozen under adapters (`model/lora.py`). A checkpoint of adapters
names its base by path and fingerprint, and is not loaded over another.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tidar_mega.checkpoint import hugging_face, state, store
from tidar_mega.checkpoint.store import CheckpointError
from tidar_mega.config import Config
from tidar_mega.config.errors import storage_error
from tidar_mega.model.gpt import HybridGPT
from tidar_mega.model.spec import set_weight
from tidar_mega.parallel.mesh import Mesh

# The shape of the weights: what a model must share with the checkpoint that it takes them from, and with its own.
SHAPE = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "head_width",
    "qk_layernorm",
    "add_qkv_bias",
    "tie_embeddings",
    "rotary_base",
    "norm_epsilon",
    "vocab_multiple",
)
_PREPARE = "prepare the text with it: tidar prepare ... --tokenizer"
_PIECES, _PIECE_BYTES = 64, 4096  # of each file that a fingerprint reads


@dataclass(frozen=True)
class Base:
    """A checkpoint, or a Hugging Face model, to begin from: its folder, made absolute, and its fingerprint."""

    path: Path
    fingerprint: str

    @classmethod
    def find(cls, config: Config, mesh: Mesh, adapters: Path | None = None) -> Base | None:
        """Collective. What `train.init_from` means, the same on every rank; None if it is not set. Where a checkpoint
        of `adapters` said the same, it is the very one that they were trained over. Raises CheckpointError."""
        if config.train.init_from is None:
            return None
        return mesh.same(mesh.on_main(lambda: cls._find(_path(config, adapters))))

    @classmethod
    def _find(cls, path: Path) -> Base:
        try:
            folder = path.absolute() if hugging_face.is_model(path) else store.resolve(path).absolute()
            return cls(folder, fingerprint(folder))
        except CheckpointError as error:
            raise CheckpointError(f"train.init_from = {path}: {error}") from None

    @property
    def meta(self) -> dict:
        """What a checkpoint of adapters says of its base."""
        return {"path": str(self.path), "fingerprint": self.fingerprint}

    def load(self, chunks: list[HybridGPT], config: Config, mesh: Mesh, vocab_size: int, tokenizer: Path) -> None:
        """Collective. Puts the checkpoint's weights into the chunks of this rank. Raises CheckpointError if its shape
        or its tokenizer is not theirs."""
        if hugging_face.is_model(self.path):
            loaded = self._load_hugging_face(chunks, config, tokenizer)
        else:
            loaded = self._load_checkpoint(chunks, config, mesh, vocab_size, tokenizer)
        for i, chunk in enumerate(chunks):
            weights = loaded[f"model{i}"]
            state.fill(chunk, weights)
            for name, weight in chunk.named_parameters():
                if name in weights:  # one that is kept in FP8 also remembers what its float32 copy is made from
                    set_weight(weight, weights[name])

    def _load_checkpoint(
        self, chunks: list[HybridGPT], config: Config, mesh: Mesh, vocab_size: int, tokenizer: Path
    ) -> dict:
        meta = store.shared_meta(self.path, mesh)
        _check(self.path, meta, config, vocab_size, tokenizer)
        saved = store.saved_config(self.path, meta)
        if saved.lora.rank:
            raise CheckpointError(
                f"train.init_from = {self.path}: holds only adapters, over {meta['base']['path']}; begin from that one"
            )
        return store.load(self.path, state.sharded_base(chunks))

    def _load_hugging_face(self, chunks: list[HybridGPT], config: Config, tokenizer: Path) -> dict:
        with _named():
            model = hugging_face.Model(self.path)
            shape = model.shape
        _require_same(self.path, shape, config)
        if tokens(self.path) != tokens(tokenizer):
            raise CheckpointError(
                f"train.init_from = {self.path}: its tokenizer is not that of data.path; {_PREPARE} {self.path}"
            )
        with _named():
            return hugging_face.load(model, state.sharded_base(chunks))

    def check_adapters(self, path: Path, meta: dict) -> None:
        """Raises CheckpointError if the adapters of the checkpoint at `path` were trained over another base."""
        base = meta["base"]
        if base["fingerprint"] != self.fingerprint:
            raise CheckpointError(
                f"train.init_from = {self.path}: not the base that the adapters of {path} were trained over "
                f"(fingerprint {self.fingerprint}, not {base['fingerprint']}); that was {base['path']}"
            )


@contextlib.contextmanager
def _named() -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"train.init_from = {error}") from None


def _path(config: Config, adapters: Path | None) -> Path:
    meta = {} if adapters is None else store.read_meta(adapters)
    is_same = "base" in meta and store.saved_config(adapters, meta).train.init_from == config.train.init_from
    return Path(meta["base"]["path"] if is_same else config.train.init_from)


def _check(path: Path, meta: dict, config: Config, vocab_size: int, tokenizer: Path) -> None:
    saved = store.saved_config(path, meta)
    _require_same(path, {name: getattr(saved.model, name) for name in SHAPE}, config)
    if meta["vocab_size"] != vocab_size or tokens(path / "tokenizer") != tokens(tokenizer):
        raise CheckpointError(
            f"train.init_from = {path}: its tokenizer ({meta['vocab_size']} ids) is not that of data.path "
            f"({vocab_size} ids); {_PREPARE} {path / 'tokenizer'}"
        )


def _require_same(path: Path, shape: dict[str, object], config: Config) -> None:
    """Raises CheckpointError that names all settings of the model which differ from the `shape` of the weights."""
    wrong = {name: was for name, was in shape.items() if was != getattr(config.model, name)}
    if wrong:
        now = ", ".join(f"model.{hugging_face.setting(name)} = {getattr(config.model, name)}" for name in wrong)
        way_out = " ".join(f"model.{hugging_face.setting(name)}={was}" for name, was in wrong.items())
        raise CheckpointError(
            f"{now}: train.init_from = {path} was made with {', '.join(map(str, wrong.values()))}; "
            f"set {way_out}, or begin from another checkpoint"
        )


def tokens(folder: Path) -> tuple:
    """Vocabulary and merges of a byte-level BPE, of whatever version of the tokenizers library."""
    try:
        if (folder / "tokenizer.json").is_file():
            model = json.loads((folder / "tokenizer.json").read_text())["model"]
            return model["vocab"], [m if isinstance(m, str) else " ".join(m) for m in model.get("merges", [])]
        merges = (folder / "merges.txt").read_text().splitlines()
        return json.loads((folder / "vocab.json").read_text()), [m for m in merges if not m.startswith("#version")]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: no tokenizer can be read there ({error})") from None


def _files(path: Path) -> dict[str, int]:
    """Name -> bytes."""
    if not hugging_face.is_model(path):
        return store.read_meta(path)["files"]
    return {file.name: file.stat().st_size for file in (path / "config.json", *path.glob("*.safetensors"))}


def fingerprint(path: Path) -> str:
    """Of a checkpoint's files: names, sizes and evenly spread pieces of each. Weights that were trained otherwise, or
    further, differ in nearly every piece; nobody waits until terabytes are read. Raises CheckpointError."""
    digest = hashlib.sha256()
    for name, size in sorted(_files(path).items()):
        digest.update(f"{name} {size}\n".encode())
        try:
            with (path / name).open("rb") as file:
                for start in sorted({size * i // _PIECES for i in range(_PIECES)}):
                    file.seek(start)
                    digest.update(file.read(_PIECE_BYTES))
        except OSError as error:
            said = f"{path / name}: cannot be read ({error.strerror})"
            raise storage_error(error, CheckpointError, said, "make it readable for this user") from None
    return digest.hexdigest()[:32]
