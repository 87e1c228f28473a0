"""Tasks of lm-evaluation-harness over the engine, against its own transformers model of the same weights."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from tests.test_decode_commands import here
from tests.test_main_job import CONFIG, make_corpus, tidar
from tidar_mega.config import UserError
from tidar_mega.decode.load import load_engine
from tidar_mega.evaluation.harness import HarnessModel

pytestmark = pytest.mark.distributed

TASKS = {  # what lm_eval asks of a model: likelihoods of choices, of whole texts, and continuations
    "own_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "own_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "own_writing": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 24, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}
ALL = ("--tasks", ",".join(TASKS), "--include-path", "tasks")
SMALL = ("--prompts=2", "--prompt-tokens=8", "--max-tokens=8", "--sequences=2")
FIGURES = ("own_choice/acc", "own_choice/acc_norm", "own_text/bits_per_byte", "own_writing/exact_match")


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A run of a few steps, and tasks with a data set of text that it knows the kind of."""
    folder = tmp_path_factory.mktemp("harness")
    make_corpus(folder)
    (folder / "run.yaml").write_text(CONFIG)
    tidar(folder, "pretrain", "run.yaml", "run_dir=run", "train.steps=80", "parallel.data=1", "model.init_std=0.05")
    text = (folder / "source" / "calendar.py").read_text()
    texts = [text[i : i + 20 + i % 170] for i in range(4000, 6000, 100)]  # up to three times data.seq_length
    docs = [{"text": t, "choices": ["e", "self" + "x" * (i % 5), " "], "answer": i % 3} for i, t in enumerate(texts)]
    (folder / "tasks").mkdir()
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    for name, task in TASKS.items():
        write_task(folder, name, task, folder / "docs.jsonl")
    return folder


def write_task(folder: Path, name: str, task: dict, docs: Path, to: str = "tasks") -> None:
    source = {"data_files": {"test": str(docs)}, "cache_dir": str(folder / "cache")}
    about = {"task": name, "dataset_path": "json", "dataset_kwargs": source, "test_split": "test"}
    (folder / to / f"{name}.yaml").write_text(json.dumps(about | task))  # JSON is YAML


def answers(model, folder: Path) -> dict[str, list]:
    """Everything that a model answered, by task."""
    manager = TaskManager(include_path=folder / "tasks", include_defaults=False)
    found = simple_evaluate(model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0)["samples"]
    return {task: [answer for sample in samples for (answer,) in sample["resps"]] for task, samples in found.items()}


@pytest.fixture(scope="module")
def ours(work) -> dict[str, list]:
    # 64 tokens in all, as transformers is told: continuations have their contexts cut to 40 as well
    loaded = load_engine(work / "run", [f"data.path={work / 'corpus'}", "decode.capacity=64"])
    return answers(HarnessModel(loaded), work)


@pytest.fixture(scope="module")
def theirs(work) -> dict[str, list]:
    from lm_eval.models.huggingface import HFLM

    tidar(work, "convert", "run", "--to", "hf")
    return answers(HFLM(str(work / "hf"), dtype="float32", device="cpu", batch_size=4), work)


def test_likelihoods_are_those_of_transformers(ours, theirs):
    assert len(ours["own_choice"]) == 60
    for (nats, is_greedy), expected in zip(ours["own_choice"], theirs["own_choice"], strict=True):
        assert (nats, is_greedy) == (pytest.approx(expected[0], abs=1e-3), expected[1])


def test_likelihoods_of_whole_texts_are_those_of_transformers(ours, theirs):
    assert ours["own_text"] == pytest.approx(theirs["own_text"], rel=1e-5)


def test_continuations_are_those_of_transformers(ours, theirs):
    assert ours["own_writing"] == theirs["own_writing"]
    assert len(set(ours["own_writing"])) > 5


def test_a_task_decides_how_it_samples(work):
    loaded = load_engine(work / "run", ["decode.batch=4", "decode.seed=3"])
    model = HarnessModel(loaded)
    settings = {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": True, "temperature": 0.9, "top_k": 20}
    texts = model.generate_until([asked("def main(", settings)] * 40)
    assert len(set(texts)) > 20, "every request has noise of its own"
    params = replace(loaded.params, max_tokens=12, stop_strings=("\n\n",), temperature=0.9, top_k=20)
    prompt = loaded.tokenizer.encode("def main(")
    alone = loaded.engine.generate([prompt], params.for_request(7), "ar")
    assert texts[7] == alone[0].text
    greedy = model.generate_until([asked("def main(", {**settings, "do_sample": False})] * 2 + [asked("", {})])
    assert greedy[0] == greedy[1] and len(model.generations) == 43


def asked(context: str, settings: dict) -> Instance:
    return Instance("generate_until", {}, (context, settings), 0)


def test_what_the_engine_does_not_do_is_refused(work):
    model = HarnessModel(load_engine(work / "run", ["decode.capacity=64"]))
    with pytest.raises(UserError, match="num_beams = 1"):
        model.generate_until([asked("a", {"num_beams": 4})])
    with pytest.raises(UserError, match="repetition_penalty"):
        model.generate_until([asked("a", {"repetition_penalty": 1.2})])
    with pytest.raises(UserError, match="set decode.capacity=128"):
        model.generate_until([asked("a", {"max_gen_toks": 64})])
    for count in (0, 65):
        pair = Instance("loglikelihood", {}, ("a", "\x00" * count), 0)
        with pytest.raises(UserError, match=rf"likelihood of {count} tokens: .*data.seq_length = 64 .*'a'"):
            model.loglikelihood([pair])


def test_a_context_of_blanks_is_the_end_of_a_document(work):
    model = HarnessModel(load_engine(work / "run"))
    blank, empty = (Instance("loglikelihood", {}, pair, 0) for pair in (("  ", "def"), ("", "  def")))
    assert model.loglikelihood([blank]) == model.loglikelihood([empty])


def test_the_choices_of_a_question_are_scored_by_one_replica(work, monkeypatch):
    """So that their context is computed once."""
    model, dealt = HarnessModel(load_engine(work / "run")), []

    def in_two(items, work, group):
        shares = [work(items[rank::2]) for rank in (0, 1)]
        dealt.extend(items)
        return [shares[i % 2][i // 2] for i in range(len(items))]

    requests = [(None, [i // 3 + 1, 2], [3, i]) for i in range(15)] + [(None, [1, 2], [77])]
    requests += [(None, [9], [i, 5]) for i in range(3)]  # no context to be computed: for any replica
    alone = model._loglikelihood_tokens(requests)
    monkeypatch.setattr("tidar_mega.evaluation.harness.share_out", in_two)
    assert model._loglikelihood_tokens(requests) == [(pytest.approx(nats, abs=1e-4), best) for nats, best in alone]
    assert dealt == [[0, 1, 2, 15], *([i, i + 1, i + 2] for i in (3, 6, 9, 12)), [16], [17], [18]]


@pytest.mark.parametrize("layout", ["decode.tensor=2", "decode.pipeline=2"])
def test_the_command_in_a_layout_says_what_one_process_says(work, layout):
    if not (work / "alone.json").exists():
        here(work, "evaluate", "run", *ALL, *SMALL, "--json", "alone.json")
    tidar(work, "evaluate", "run", layout, *ALL, *SMALL, "--json", "ranks.json")
    alone, ranks = (json.loads((work / name).read_text()) for name in ("alone.json", "ranks.json"))
    for name in FIGURES:
        assert ranks[name] == pytest.approx(alone[name], rel=1e-4), name
    assert alone["tasks_tokens_per_forward"] > 1 and ranks["tasks_tokens_per_forward"] > 1
    kept = json.loads((work / "run" / "evaluations.jsonl").read_text().splitlines()[-1])
    assert kept == ranks, "also a line of the run folder"


def test_a_watch_hands_on_what_it_was_asked_and_replicas_divide_it(work):
    shutil.copytree(work / "run", work / "watched", ignore=shutil.ignore_patterns("evaluations.jsonl"))
    shutil.rmtree(sorted((work / "watched" / "checkpoints").glob("step_*"))[0])  # one is enough
    few = ("--limit=3", "--num-fewshot=0")
    here(work, "evaluate", "run", *ALL, *few, *SMALL, "--json", "few.json")
    tidar(work, "evaluate", "watched", "--watch", *ALL, *few, *SMALL, "decode.data=2")
    (line,) = (work / "watched" / "evaluations.jsonl").read_text().splitlines()
    found, alone = json.loads(line), json.loads((work / "few.json").read_text())
    for name in (*FIGURES, "tasks_tokens_per_forward"):
        assert found[name] == pytest.approx(alone[name], rel=1e-5), name


def test_bad_tasks_are_one_clear_error(work):
    (work / "broken").mkdir()
    write_task(work, "own_lost", TASKS["own_text"], work / "nothing.jsonl", "broken")
    write_task(work, "own_code", {**TASKS["own_text"], "unsafe_code": True}, work / "docs.jsonl", "broken")
    for words, said in {
        ("--tasks", "own_choise", "--include-path", "tasks"): "no task of that name (it has own_choice",
        ("--tasks", "own_text", "--include-path", "nowhere"): "--include-path nowhere: there is no such folder",
        ("--tasks", "own_lost", "--include-path", "broken"): "--tasks own_lost: one could not be loaded",
        ("--tasks", "own_code", "--include-path", "broken"): "--tasks own_code: runs the code that the model writes",
    }.items():
        assert said in here(work, "evaluate", "run", *words, *SMALL, code=2)


def test_without_lm_eval_the_command_says_what_to_install(work, monkeypatch):
    monkeypatch.delitem(sys.modules, "tidar_mega.evaluation.harness")
    monkeypatch.delattr("tidar_mega.evaluation.harness")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install lm-eval" in here(work, "evaluate", "run", *ALL, code=2)
