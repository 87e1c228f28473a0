"""Every setting of a run as a dataclass (`settings.py`), read from YAML files and `a.b=c` overrides (`tree.py`).

`load` refuses unknown keys, wrong types and impossible combinations (`checks.py`) before anything starts. An error
names the key, the value found, what is allowed and what to do. Imports nothing of ours and no torch.
"""

from tidar_mega.config.batch import check_batch, replicas
from tidar_mega.config.checks import check
from tidar_mega.config.errors import ConfigError, LostError, UserError, require
from tidar_mega.config.settings import (
    METHODS,
    Config,
    DataConfig,
    LoraConfig,
    ModelConfig,
    ParallelConfig,
    PrecisionConfig,
)
from tidar_mega.config.tree import from_tree, load, override, to_tree, to_yaml

__all__ = [
    "Config",
    "ConfigError",
    "DataConfig",
    "LoraConfig",
    "LostError",
    "METHODS",
    "ModelConfig",
    "ParallelConfig",
    "PrecisionConfig",
    "UserError",
    "check",
    "check_batch",
    "from_tree",
    "load",
    "override",
    "replicas",
    "require",
    "to_tree",
    "to_yaml",
]
