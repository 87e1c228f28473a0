"""`tidar <verb>`: the one room that sees all others. Heavy imports happen inside the verbs."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import importlib
import os
import sys
import warnings
from pathlib import Path
from typing import NoReturn

from tidar_mega import config as config_module
from tidar_mega.arguments import STDOUT, add_json, check_file, file, write_json
from tidar_mega.config import Config, UserError

# What megatron-core and torch say at import and inside their own calls, on every rank; `tidar doctor` says it once.
_THEIR_WARNINGS = r"(megatron|torch)\."


def entry_point() -> NoReturn:
    """The command `tidar`: `main`, then the end of this process."""
    code = main()
    dist = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_initialized():
        sys.exit(code)
    # Threads of a group outlive `destroy_process_group` where megatron still holds the group. One that lets go of a
    # tensor while Python is taken down ends the process by SIGABRT, and work that was done would look failed.
    if code == 0:
        dist.destroy_process_group()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main(argv: list[str] | None = None) -> int:
    warnings.filterwarnings("ignore", module=_THEIR_WARNINGS)
    arguments = sys.argv[1:] if argv is None else argv
    parser = _parser(arguments)
    args, rest = parser.parse_known_args(arguments)
    overrides = [a for a in rest if "=" in a and not a.startswith("-") and "overrides" in args]
    if overrides != rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # settings may also stand behind options
        args.overrides += rest
    try:
        args.arguments = list(arguments)
        figures_to = getattr(args, "json", None)
        check_file("--json", figures_to)
        with contextlib.redirect_stdout(sys.stderr if figures_to == STDOUT else sys.stdout):
            return args.verb(args) or 0
    except UserError as error:
        rank = f"[rank {os.environ['RANK']}] " if os.environ.get("RANK", "0") != "0" else ""
        print(f"{rank}error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def _parser(arguments: list[str]) -> argparse.ArgumentParser:
    """All verbs are listed, but only the chosen one says its arguments: that may import a whole room."""
    parser = argparse.ArgumentParser(prog="tidar", description="Pretrain and decode TiDAR language models.")
    _add_choices(parser, _VERBS, arguments, "VERB")
    return parser


def _add_choices(parser: argparse.ArgumentParser, choices: dict, arguments: list[str], name: str) -> None:
    group = parser.add_subparsers(required=True, metavar=name)
    for choice, (add_arguments, description) in choices.items():
        chosen = group.add_parser(choice, help=description, description=description)
        if arguments[:1] == [choice]:
            add_arguments(chosen, arguments[1:])


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="a run folder, or one of its checkpoints/step_* folders")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, such as decode.temperature=1")


# doctor


def _add_doctor(parser, _) -> None:
    parser.set_defaults(verb=_doctor)
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="also check every shard of a prepared folder")
    add_json(parser)


def _doctor(args) -> int:
    from tidar_mega import doctor

    findings = doctor.examine(args.data)
    doctor.show(findings)
    write_json(args.json, {f.name: f.status for f in findings})
    return 1 if any(f.status == doctor.MISSING for f in findings) else 0


# prepare


def _add_prepare(parser, _) -> None:
    from tidar_mega.data import prepare

    parser.set_defaults(verb=_prepare)
    prepare.add_arguments(parser)
    add_json(parser)


def _prepare(args) -> None:
    from tidar_mega.data import prepare

    write_json(args.json, prepare.run(args))


# plan


def _add_plan(parser, _) -> None:
    from tidar_mega.plan import command

    parser.set_defaults(verb=_plan)
    command.add_arguments(parser)
    add_json(parser)


def _plan(args) -> int:
    from tidar_mega.plan import command

    figures = command.run(args)
    write_json(args.json, figures)
    return 0 if figures["fits"] else 1


# pretrain


def _add_pretrain(parser, _) -> None:
    parser.set_defaults(verb=_pretrain)
    parser.add_argument("config", type=Path, help="a YAML file, such as configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, such as train.steps=100")
    parser.add_argument("--print-config", action="store_true", help="print every setting and stop")


def _pretrain(args) -> int:
    from tidar_mega import launch

    config = config_module.load(args.config, args.overrides)
    if args.print_config:
        print(config_module.to_yaml(config), end="")
        return 0
    has_rank = launch.set_distributed_env()
    if (steps := launch.finished(config)) is not None:
        if os.environ.get("RANK", "0") == "0":
            print(f"already done: {steps} steps; raise train.steps to go on", flush=True)
        return 0
    if has_rank:
        return _pretrain_worker(config)
    import torch

    from tidar_mega.data.mixture import open_data

    gpus = torch.cuda.device_count()
    processes = launch.local_processes(config, gpus)
    for split in ("train", "validation"):  # bad data is one error here, before any process starts
        open_data(config.data, split, config.train.seed)
    return launch.run_local(["pretrain", str(args.config), *args.overrides], processes, gpus)


def _pretrain_worker(config: Config) -> int:
    from tidar_mega import launch
    from tidar_mega.train.health import StopRequest

    stop = StopRequest()
    import torch.distributed as dist

    from tidar_mega.parallel.mesh import build_mesh
    from tidar_mega.train import ending, preflight
    from tidar_mega.train.loop import train

    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if config.launch.preflight:
        preflight.check_gpu(local_rank, lambda nodes: launch.note_bad_nodes(config, nodes))
    ending.join(config, local_rank)
    with ending.opened(config, lambda code: launch.note_exit(config, code)) as roll_call:
        mesh, rank = build_mesh(config), dist.get_rank()
        if config.launch.preflight:
            roll_call.at(0, "preflight")
            found = preflight.check(config, lambda nodes: launch.note_bad_nodes(config, nodes))
            if rank == 0:
                print(found, flush=True)
        if rank == 0:
            launch.begin(config)
        # a rank of the start before may still be ending; the other ranks wait half of what a collective may take
        patience = 30 * config.parallel.timeout_minutes if launch.restart_count() else 0.0
        progress = train(config, mesh, stop, roll_call, patience)
    stop.ignore()
    return launch.finish_or_requeue(config, progress.step) if rank == 0 else 0


# launch


def _add_launch(parser, _) -> None:
    from tidar_mega.launch import command

    parser.set_defaults(verb=command.run)
    command.add_arguments(parser)


# generate


def _add_generate(parser, _) -> None:
    parser.set_defaults(verb=_generate)
    _add_checkpoint(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="the text to continue")
    source.add_argument("--prompt-file", type=Path, help="a file that holds the text to continue")
    parser.add_argument("--show-commits", action="store_true", help="mark what each forward committed")
    parser.add_argument(
        "--trace",
        type=file,
        nargs="?",
        const=STDOUT,
        metavar="FILE",
        help="show each forward's draft, what was accepted and what AR put instead; with a FILE, as a page of HTML",
    )
    add_json(parser)


def _generate(args) -> int | None:
    prompt = args.prompt if args.prompt is not None else _read_text(args.prompt_file)
    check_file("--trace", args.trace)
    if (code := _in_ranks(args)) is not None:
        return code
    from tidar_mega.decode import generate

    write_json(args.json, generate.run(args.checkpoint, args.overrides, prompt, args.show_commits, args.trace))
    return None


def _in_ranks(args) -> int | None:
    """Where decode.* wants several processes: starts them with this same command and returns their exit code.

    None in one of them, or where one process is enough.
    """
    from tidar_mega import launch
    from tidar_mega.decode import load

    if launch.set_distributed_env():
        if os.environ["RANK"] != "0":
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
            args.json = None
        return None
    sizes = load.sizes(load.saved(args.checkpoint, args.overrides)[1])
    if set(sizes.values()) == {1}:
        return None
    import torch

    gpus = torch.cuda.device_count()
    return launch.run_local(args.arguments, launch.processes_of("decode", sizes, gpus), gpus)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt-file {path}: cannot be read as UTF-8 text ({error})") from None


# bench


def _add_bench(parser, arguments: list[str]) -> None:
    choices = {name: (_measurement(name, of_checkpoint), text) for name, (of_checkpoint, text) in _BENCHES.items()}
    _add_choices(parser, choices, arguments, "WHAT")


def _measurement(name: str, of_checkpoint: bool):
    """Adds the arguments of `bench/<name>.py`."""

    def add(parser, _) -> None:
        module = importlib.import_module(f"tidar_mega.bench.{name}")
        parser.set_defaults(verb=_bench, measure=module.run)
        if of_checkpoint:
            _add_checkpoint(parser)
        module.add_arguments(parser)
        add_json(parser)

    return add


def _bench(args) -> int | None:
    if "checkpoint" in args and (code := _in_ranks(args)) is not None:
        return code
    write_json(args.json, args.measure(args))
    return None


# evaluate


def _add_evaluate(parser, _) -> None:
    from tidar_mega.evaluation import watch

    parser.set_defaults(verb=_evaluate)
    _add_checkpoint(parser)
    watch.add_arguments(parser)
    add_json(parser)


def _evaluate(args) -> int | None:
    if args.watch:
        from tidar_mega.evaluation import watch

        return watch.run(args)
    from tidar_mega.evaluation import checkpoint
    from tidar_mega.train import board

    tasks = checkpoint.find_tasks(args)
    if (code := _in_ranks(args)) is not None:
        return code
    write_json(args.json, checkpoint.run(args, tasks, board.evaluation))
    return None


# board


def _add_board(parser, _) -> None:
    from tidar_mega.train import board

    parser.set_defaults(verb=board.serve)
    board.add_arguments(parser)


# convert


def _add_convert(parser, _) -> None:
    parser.set_defaults(verb=_convert)
    _add_checkpoint(parser)
    parser.add_argument(
        "--to", type=Path, required=True, metavar="FOLDER", help="a new folder for the Hugging Face model"
    )


def _convert(args) -> None:
    from tidar_mega.decode import load

    print(load.export(args.checkpoint, args.overrides, args.to))


_VERBS = {
    "doctor": (_add_doctor, "Say what is installed, what is absent, what that costs and how to fix it."),
    "prepare": (_add_prepare, "Make a tokenizer and webdataset shards from text."),
    "plan": (_add_plan, "Say what a run would take: memory, FLOPs, communication, time; find the layouts that fit."),
    "pretrain": (_add_pretrain, "Train, or go on from the newest checkpoint of the run folder."),
    "launch": (_add_launch, "Train in a Slurm job that goes back into the queue until the run is finished."),
    "generate": (_add_generate, "Continue a prompt, streamed as tokens are committed."),
    "evaluate": (_add_evaluate, "Decode held-out text with a checkpoint, or with each new one of a run (--watch)."),
    "board": (_add_board, "Show the runs in a folder in TensorBoard, on this machine alone unless told otherwise."),
    "convert": (
        _add_convert,
        "Write a checkpoint as a Hugging Face model, for transformers and all that builds on it.",
    ),
    "bench": (_add_bench, "Measure speed as a ratio against a baseline in the same run."),
}
_BENCHES = {  # whether of a checkpoint, and what for
    "attention": (False, "Attention backends against the dense mask and plain causal attention."),
    "train": (False, "A training step against a plain-PyTorch model with the dense mask."),
    "layouts": (False, "Every parallel layout against one process, and its share of communication."),
    "decode": (True, "Fused decoding against plain AR in the same engine, and against transformers."),
    "diffusion": (True, "Self-speculative against standard masked diffusion: quality against forwards."),
    "methods": (False, "Every method, trained on the same text from the same start, and decoded."),
    "slots": (True, "One decoding forward against its number of rows; decode.outcomes=auto uses it."),
}

if __name__ == "__main__":
    entry_point()
