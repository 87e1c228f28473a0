import pytest

from tidar_mega import config as config_module
from tidar_mega.config import ConfigError, load, replicas

BAD = {
    "train.bloc=3": "train.block",
    "train.block=3": "data.seq_length",
    "train=3": "section",
    "train.steps=abc": "train.steps",
    "train.steps=0": "above 0",
    "model.num_attention_heads=5": "model.hidden_size",
    "model.num_query_groups=3": "model.num_attention_heads",
    "model.kv_channels=63": "even",
    "train.clean_weight=0": "above 0",
    "train.mtp_loss_scaling_factor=0": "above 0",
    "parallel.tensor=3": "parallel.tensor",
    "parallel.sequence=true": "parallel.tensor",
    "parallel.overlap_param_gather=true": "overlap_grad_reduce",
    "parallel.data=3": "train.global_batch_size",
    "train.draft_fraction=0": "train.draft_fraction",
    "optimizer.schedule=linear": "cosine",
    "optimizer.warmup_steps=1000": "train.steps",
    "optimizer.min_lr=1": "optimizer.lr",
    "precision.dtype=fp8": "bf16",
    "precision.fp8=bogus": "tensorwise",
    "model.attention=fast": "tiles",
    "no_such=1": "allowed here",
    "oops": "key=value",
    "train.alpha=0": "above 0",
    "optimizer.beta1=1.5": "below 1",
    "decode.stop=[a": "quote its value",
    "run_dir=a: b: c": "quote its value",
}


@pytest.mark.parametrize("override", BAD, ids=BAD.keys())
def test_a_bad_setting_is_refused_and_the_way_out_is_named(override):
    with pytest.raises(ConfigError) as error:
        load(None, [override])
    assert BAD[override] in str(error.value)
    assert override.split("=")[0] in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["parallel.pipeline=3"], "model.num_layers = 4: must be a multiple of parallel.pipeline.*last_stage_layers"),
        (["parallel.last_stage_layers=1"], "parallel.last_stage_layers = 1: must be null with parallel.pipeline = 1"),
        (["parallel.pipeline=2", "parallel.last_stage_layers=0"], "last_stage_layers = 0: must be 1 or more"),
        (["parallel.pipeline=2", "parallel.last_stage_layers=4"], "last_stage_layers = 4: must be such .*0 of 4"),
        (["parallel.pipeline=3", "parallel.first_stage_layers=1"], "first_stage_layers = 1: must be such .*3 of 4"),
        (
            ["parallel.pipeline=2", "parallel.first_stage_layers=1", "parallel.last_stage_layers=1"],
            "last_stage_layers = 1: must be such .*none are left",
        ),
        (
            ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "parallel.last_stage_layers=1"],
            "last_stage_layers = 1: must be 1 or more, and a multiple of parallel.virtual_pipeline",
        ),
        (
            [
                "parallel.pipeline=2",
                "parallel.last_stage_layers=1",
                "parallel.recompute=full",
                "parallel.recompute_layers=3",
            ],
            "recompute_layers = 3: must be a divisor of the layers of a stage .1 and 3.",
        ),
    ],
)
def test_stages_that_cannot_be_made_are_refused(overrides, said):
    with pytest.raises(ConfigError, match=said):
        load(None, overrides)


def test_layers_of_the_stages():
    def stages(*overrides: str) -> tuple[int, ...]:
        return load(None, [f"parallel.{override}" for override in overrides]).stage_layers

    assert stages("pipeline=1") == (4,)
    assert stages("pipeline=2") == (2, 2)
    assert stages("pipeline=2", "last_stage_layers=1") == (3, 1)
    assert stages("pipeline=3", "last_stage_layers=2") == (1, 1, 2)
    assert stages("pipeline=3", "first_stage_layers=1", "last_stage_layers=1") == (1, 2, 1)


def test_files_and_overrides_merge_and_come_back_from_a_tree(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("train:\n  steps: 7\nmodel:\n  kv_channels: 32\noptimizer:\n  warmup_steps: 2\n")
    config = load(path, ["train.seed=5", "parallel.data=2"])
    assert (config.train.steps, config.model.kv_channels, config.train.seed, config.parallel.data) == (7, 32, 5, 2)
    assert config_module.from_tree(config_module.to_tree(config)) == config
    (tmp_path / "again.yaml").write_text(config_module.to_yaml(config))
    assert load(tmp_path / "again.yaml") == config


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        load(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(ConfigError, match=r"bad\.yaml is not valid YAML"):
        load(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="mapping"):
        load(tmp_path / "list.yaml")


def test_a_config_is_frozen():
    with pytest.raises(AttributeError):
        load(None).train.steps = 3


def test_every_shipped_config_loads():
    from pathlib import Path

    paths = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
    assert paths
    for path in paths:
        load(path)


def test_rows_that_sequence_parallel_cannot_split_are_refused():
    split = ["parallel.tensor=4", "parallel.sequence=true", "data.seq_length=48", "train.block=2"]
    load(None, [*split, "train.draft_fraction=0.25"])
    with pytest.raises(ConfigError, match=r"48 \+ 10"):
        load(None, [*split, "train.draft_fraction=0.2"])


def test_replicas_are_what_the_model_leaves_of_the_processes():
    split = load(None, ["parallel.tensor=2", "parallel.context=2"])
    assert replicas(split, 4, "4 GPUs") == 1 and replicas(split, 8, "8 GPUs") == 2
    with pytest.raises(ConfigError, match=r"= 2 x 1 x 2: must divide the 6 GPUs; .* a multiple of 4"):
        replicas(split, 6, "6 GPUs")
    with pytest.raises(ConfigError, match=r"parallel.data = 1: 8 GPUs .* make 2 replicas; set it to 2 or to null"):
        replicas(load(None, ["parallel.data=1", "parallel.tensor=4"]), 8, "8 GPUs")
    with pytest.raises(ConfigError, match=r"train.global_batch_size = 16: must be a multiple of .* \(8 x 4\)"):
        replicas(split, 16, "16 GPUs")


def test_one_process_per_gpu():
    from tidar_mega import launch

    two = load(None, ["parallel.data=2"])
    assert launch.local_processes(two, gpus=0) == launch.local_processes(two, gpus=2) == 2
    assert launch.local_processes(load(None, ["train.global_batch_size=64"]), gpus=8) == 8
    with pytest.raises(ConfigError, match=r"train.global_batch_size = 16: must be a multiple of .* \(8 x 8\)"):
        launch.local_processes(load(None), gpus=8)  # before any process starts
    with pytest.raises(ConfigError, match=r"this machine has 1 GPU"):
        launch.local_processes(two, gpus=1)
