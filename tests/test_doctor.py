"""`tidar doctor` names what is absent, what it costs and the fix, and its exit code says whether a run can start."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from tidar_mega import cli, doctor
from tidar_mega.model.precision import Machine


def test_a_machine_that_can_run_is_ok_and_says_what_is_slow(capsys, tmp_path):
    assert cli.main(["doctor", "--json", str(tmp_path / "doctor.json")]) == 0
    status = json.loads((tmp_path / "doctor.json").read_text())
    assert status["torch"] == status["megatron-core"] == status["psutil"] == doctor.OK
    if not torch.cuda.is_available():
        for name in ("device", "NCCL", "transformer-engine", "FP8", "apex"):
            assert status[name] == doctor.WARN, name
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


@pytest.mark.parametrize(
    ("machine", "status", "found", "fix"),
    [
        ((None, None, None), doctor.WARN, "none: ", "CUDA GPU"),
        ((None, (9, 0), "13.0"), doctor.WARN, "none: ", "pip install"),
        (("2.9.0", (8, 0), "13.0"), doctor.WARN, "none: ", "8.9"),
        (("2.9.0", (9, 0), "13.0"), doctor.OK, "delayed, tensorwise, blockwise", ""),
        (("2.9.0", (9, 0), "12.8"), doctor.OK, "delayed, tensorwise", "blockwise needs CUDA 12.9"),
        (("2.2", (8, 9), "12.4"), doctor.OK, "delayed, tensorwise", ""),
        (("2.1", (10, 0), "12.8"), doctor.OK, "delayed, mxfp8", "tensorwise needs Transformer Engine 2.2; blockwise"),
    ],
)
def test_fp8_says_which_recipes_this_gpu_can_do(machine, status, found, fix):
    engine, capability, cuda = machine
    finding = doctor.fp8(Machine(capability=capability, cuda=cuda, engine=engine))
    assert finding.status == status and found in finding.found and fix in finding.fix
    assert fix or not finding.fix


def test_transformer_engine_that_cannot_be_imported_is_no_engine():
    gpu = {"capability": (9, 0), "cuda": "13.0"}
    assert doctor._engine(Machine(), "2.9.0").status == doctor.MISSING, "megatron-core would import it"
    assert doctor._engine(Machine(**gpu, engine="2.9.0"), "2.9.0").status == doctor.OK
    broken = doctor._engine(Machine(**gpu, why_no_engine="its import fails: no libcublas"), "2.9.0")
    assert broken.status == doctor.MISSING and "libcublas" in broken.found and "pip install" in broken.fix
