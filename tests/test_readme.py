"""README says only what is true: its commands parse, its files exist, its figures come from docs/log.md."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tidar_mega import cli, config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = sorted(set(re.findall(r"^    (tidar .*?)(?:\s+#.*)?$", README, re.M)))


def test_there_are_commands():
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_parses_and_its_settings_are_allowed(line):
    words = shlex.split(line.replace("SOURCE...", "SOURCE"))[1:]
    args, rest = cli._parser(words).parse_known_args(words)
    overrides = [w for w in words if re.match(r"^[a-z_.]+=", w)]
    assert set(rest) <= set(overrides)
    config.load(None, overrides)
    for word in words:
        if word.startswith("configs/"):
            assert (ROOT / word).is_file()


@pytest.mark.parametrize("target", re.findall(r"`?make ([a-z-]+)", README))
def test_every_make_target_exists(target):
    assert f"\n{target}:" in (ROOT / "Makefile").read_text()


def test_every_named_place_exists():
    for name in re.findall(r"`((?:tidar_mega|tests|docs|configs)/[\w./]*)`", README):
        assert (ROOT / name).exists(), name


def test_every_named_setting_exists():
    tree = config.to_tree(config.load(None))
    for section, key in re.findall(r"`(model|data|train|parallel|precision|decode|checkpoint|launch)\.(\w+)`", README):
        assert key in tree[section], f"{section}.{key}"


def test_the_quickstart_runs_the_commands_of_the_readme():
    script = " ".join((ROOT / "tools" / "quickstart.py").read_text().split())
    for words in ('"prepare", "stdlib"', '"pretrain", CONFIG', '"generate", str(RUN)', '"bench", "decode"'):
        assert words in script
    for value in (
        "--vocab-size",
        "288",
        "--validation-fraction",
        "0.02",
        "def read_lines(path",
        "decode.max_tokens=200",
    ):
        assert value in script and value in README


def test_figures_of_the_table_are_in_the_log():
    """Each figure stands in the log as a whole number, not as a part of another."""
    log = (ROOT / "docs" / "log.md").read_text()
    rows = re.findall(r"^\| .*\| ([\d.x%/ ]+) \|$", README, re.M)
    figures = [figure for row in rows for figure in re.findall(r"[\d.]+", row)]
    assert len(figures) >= 8
    for figure in figures:
        assert re.search(rf"(?<![\d.]){re.escape(figure)}(?![\d])", log), figure
