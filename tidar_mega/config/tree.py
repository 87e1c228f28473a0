"""Trees of settings (YAML files, `a.b=c` overrides, what a checkpoint stores) to a checked Config and back, through
OmegaConf's structured configs."""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tidar_mega.config.checks import check
from tidar_mega.config.errors import ConfigError
from tidar_mega.config.settings import Config


def load(path: str | Path | None, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Reads the YAML file at `path` (all defaults when None), applies the overrides and checks the result.

    Raises ConfigError.
    """
    tree = _read_yaml(Path(path)) if path is not None else OmegaConf.create({})
    return _with_overrides(tree, overrides)


def override(config: Config, overrides: list[str] | tuple[str, ...]) -> Config:
    """`config` with `a.b=c` overrides, checked again. Raises ConfigError."""
    return _with_overrides(OmegaConf.create(to_tree(config)), overrides)


def _with_overrides(tree: DictConfig, overrides: list[str] | tuple[str, ...]) -> Config:
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"override {override!r} is not of the form key=value, for example train.steps=100")
        try:
            tree = OmegaConf.merge(tree, OmegaConf.from_dotlist([override]))
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            said = str(error).splitlines()[0]
            raise ConfigError(f"override {override!r}: not a setting in YAML ({said}); quote its value") from None
    return from_tree(tree)


def from_tree(tree: DictConfig | dict) -> Config:
    """A checked Config from a (possibly partial) tree of settings, as stored in a checkpoint. Raises ConfigError."""
    tree = OmegaConf.create(tree) if isinstance(tree, dict) else tree
    _refuse_unknown(tree, Config, "")
    schema = OmegaConf.structured(Config)
    _set_writable(schema)
    try:
        config = OmegaConf.to_object(OmegaConf.merge(schema, tree))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "config"
        raise ConfigError(f"{key}: {str(error).splitlines()[0]}") from None
    check(config)
    return config


def to_yaml(config: Config) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def to_tree(config: Config) -> dict:
    """Plain nested dicts, the form that a checkpoint stores."""
    return dataclasses.asdict(config)


def _read_yaml(path: Path) -> DictConfig:
    if not path.is_file():
        near = sorted(str(p) for p in path.parent.glob("*.yaml"))
        hint = f"; found there: {', '.join(near)}" if near else ""
        raise ConfigError(f"config file {path} does not exist{hint}")
    try:
        tree = OmegaConf.load(path)
    except Exception as error:  # yaml and OmegaConf raise many kinds
        raise ConfigError(f"config file {path} is not valid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(tree, DictConfig):
        raise ConfigError(f"config file {path} must hold a mapping of keys, found {type(tree).__name__}")
    return tree


def _refuse_unknown(tree: DictConfig, kind: type, prefix: str) -> None:
    allowed = {f.name: f for f in dataclasses.fields(kind)}
    for key in tree:
        name = f"{prefix}{key}"
        if key not in allowed:
            near = difflib.get_close_matches(str(key), allowed, n=1, cutoff=0.5)
            hint = f"did you mean {prefix}{near[0]}? " if near else ""
            raise ConfigError(f"unknown key {name}; {hint}allowed here: {', '.join(sorted(allowed))}")
        section = allowed[key].default_factory
        if isinstance(section, type) and dataclasses.is_dataclass(section):
            value = tree._get_node(key)
            if not isinstance(value, DictConfig):
                names = ", ".join(f.name for f in dataclasses.fields(section))
                raise ConfigError(f"{name} = {value} is a section, not a value; set one of its keys: {names}")
            _refuse_unknown(value, section, f"{name}.")


def _set_writable(node: DictConfig) -> None:
    OmegaConf.set_readonly(node, False)  # frozen dataclasses come out read-only, which also refuses the merge
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig):
            _set_writable(child)
