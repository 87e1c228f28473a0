"""`tidar doctor` names what is absent, what it costs and the fix, and its exit code says whether a run can start."""

from __future__ import annotations

import importlib.util
import json

import torch

from tidar_mega import cli, doctor


def test_a_machine_that_can_run_is_ok_and_says_what_is_slow(capsys, tmp_path):
    assert cli.main(["doctor", "--json", str(tmp_path / "doctor.json")]) == 0
    status = json.loads((tmp_path / "doctor.json").read_text())
    assert status["torch"] == status["megatron-core"] == status["psutil"] == doctor.OK
    if not torch.cuda.is_available():
        assert status["device"] == status["transformer-engine"] == doctor.WARN
    assert "transformer-engine" in capsys.readouterr().out


def test_a_missing_package_is_an_error_with_its_fix(monkeypatch, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "psutil" else real(name, *a))
    assert cli.main(["doctor"]) == 1
    found = next(f for f in doctor.examine() if f.name == "psutil")
    assert found.status == doctor.MISSING and "pip install" in found.fix


def test_data_that_is_not_there_is_named(tmp_path):
    folder = tmp_path / "none"
    assert cli.main(["doctor", "--data", str(folder)]) == 1
    found = doctor.examine(folder)[-1]
    assert found.status == doctor.MISSING and str(folder) in found.found and found.fix
