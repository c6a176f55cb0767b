"""Configuration: a wrong key or value is named, and every experiment builds at full size."""

import dataclasses
import json
import runpy
import subprocess
import sys

import numpy as np
import pytest
from absl import flags
from helpers.paths import EXPERIMENTS, GOLDEN
from ml_collections import config_flags

from starflow2_jax import config, mesh
from starflow2_jax.checkpoints import model_folder, orbax
from starflow2_jax.checkpoints.open_model import open_model
from starflow2_jax.config import checks
from starflow2_jax.models.fae.codec import FAEConfig
from starflow2_jax.models.fae.dinov2 import DinoConfig
from starflow2_jax.models.flow import FlowConfig
from starflow2_jax.models.qwen import QwenConfig
from starflow2_jax.models.qwen_vision import VisionConfig
from starflow2_jax.runtime import cli, memory
from starflow2_jax.training.logging import run_log
from starflow2_jax.training.program import check_memory
from starflow2_jax.training.tasks import registry

VARIANTS = ["tarflow_pixels:tiny", "tarflow_pixels:cifar", "tarflow_pixels:in64",
            "starflow_t2i:tiny", "starflow_t2i:3b"]  # fmt: skip
STAGES = [f"{stage}:{size}" for stage in ("stage1_t2i", "stage2_i2t", "stage3_joint")
          for size in ("tiny", "shipped", "small", "paper")]  # fmt: skip


def experiment(name):
    file, variant = name.split(":")
    return runpy.run_path(str(EXPERIMENTS / f"{file}.py"))["get_config"](variant)


def changed(**changes):
    """The defaults with dotted keys set, new ones among them."""
    cfg = config.to_dict(config.default())
    for dotted, value in changes.items():
        group, (*path, last) = cfg, dotted.split(".")
        for part in path:
            group = group.setdefault(part, {})
        group[last] = value
    return cfg


@pytest.mark.fast
def test_defaults_are_whole_and_pass():
    cfg = config.default()
    config.check(cfg)
    config.check(config.to_dict(cfg))
    assert set(config.flat(cfg)) == set(config.KEYS)
    assert all(key.doc for key in config.KEYS.values())


@pytest.mark.fast
@pytest.mark.parametrize(
    "key, value, words",
    [
        ("optim.rl", 1.0, "unknown key 'optim.rl'; did you mean 'optim.lr'?"),
        ("trian.steps", 3, "unknown key 'trian.steps'; did you mean 'train.steps'?"),
        ("optim", 3, "unknown key 'optim'"),
        ("train.trains", ["flow"], "key 'train.trains' is now called 'train.trainable'"),
        ("zzz", 1, "unknown key 'zzz'"),
        ("train.steps", 0, "train.steps=0 must be a positive whole number"),
        ("train.steps", "many", "train.steps='many' must be a positive whole number"),
        ("train.batch_size", 6.0, "train.batch_size=6.0 must be a positive whole number"),
        ("train.steps", True, "train.steps=True must be a positive whole number"),
        ("text.vocabulary", 256, "text.vocabulary=256 must be 0, or at least 257"),
        ("optim.warmup", -1, "optim.warmup=-1 must be a whole number, 0 or more"),
        ("optim.lr", -1e-3, "optim.lr=-0.001 must be a number from 0 to 1e+09"),
        ("optim.lr", float("nan"), "optim.lr=nan must be a number from 0 to 1e+09"),
        ("optim.lr", float("inf"), "optim.lr=inf must be a number from 0 to 1e+09"),
        ("optim.lr", 1e300, "optim.lr=1e+300 must be a number from 0 to 1e+09"),
        ("optim.lr", True, "optim.lr=True must be a number from 0 to 1e+09"),
        ("seed", 2**32, "seed=4294967296 must be a whole number, 0 or more, at most 4294967294"),
        ("train.steps", 2**31, "must be a positive whole number, at most 2147483647"),
        ("data.threads", 10**6, "must be a positive whole number, at most 1024"),
        ("distributed.heartbeat", 10**9, "must be a positive whole number, at most 1000000"),
        ("data.path", "a\0b", "data.path='a\\x00b' must be a string"),
        ("data.path", "\ud800", "data.path='\\ud800' must be a string"),
        ("data.mixture", None, "data.mixture=None must be a list of groups"),
        ("data.mixture", [1], "data.mixture=[1] must be a list of groups"),
        ("data.mixture", [{"path": 1}], "must be a list of groups of strings, with a weight"),
        ("data.mixture", [{"path": "a", "weight": float("nan")}], "with a weight from 0 to 1e+09"),
        ("data.mixture", [{"path": "a", "weight": "1"}], "with a weight from 0 to 1e+09"),
        ("sample.prompts", float("-inf"), "sample.prompts=-inf must be a list of strings"),
        ("sample.prompts", "one", "sample.prompts='one' must be a list of strings"),
        ("sample.prompts", [1], "sample.prompts=[1] must be a list of strings"),
        ("train.trainable", None, "train.trainable=None must be a list of strings"),
        ("log.trackers", ["x"], "must be a list of some of tensorboard, wandb, trackio"),
        ("log.profile_steps", [3], "log.profile_steps=[3] must be empty, or the numbers of two"),
        ("log.profile_steps", [3, 2], "the first not after the last"),
        ("fae.discriminator_widths", float("nan"), "must be a list of 1 to 16 positive whole"),
        ("fae.discriminator_widths", [64, 0], "must be a list of 1 to 16 positive whole numbers"),
        ("teacher.tower", 3, "teacher.tower=3 must be a group of keys"),
        ("model", 3, "config: model=3 must be a group of keys"),
        ("name", 3, "config: name=3 must be a string"),
        ("noise.kind", ["gaussian"], "noise.kind=['gaussian'] must be one of gaussian"),
        ("cfg_dropout.text", 1.5, "cfg_dropout.text=1.5 must be a number from 0 to 1"),
        ("noise.kind", "gauss", "noise.kind='gauss' must be one of gaussian, uniform, none"),
        ("image.flip", 1, "image.flip=1 must be True or False"),
        ("data.path", None, "data.path=None must be a string"),
        ("compute_dtype", "fp8", "'fp8' must be one of float32, bfloat16, float64"),
        ("train.microbatches", 7, "train.batch_size=64 is not a multiple of train.microbatches=7"),
    ],
)
def test_a_wrong_key_or_value_is_named(key, value, words):
    with pytest.raises(ValueError) as error:
        config.check(changed(**{key: value}))
    assert words in str(error.value) and str(error.value).startswith("config: ")


@pytest.mark.fast
def test_a_number_of_thousands_of_digits_is_one_line():
    with pytest.raises(ValueError, match=r"^config: optim.lr=a int too large to print must be a"):
        config.check(changed(**{"optim.lr": 10**5000}))


@pytest.mark.fast
def test_a_missing_key_is_named():
    cfg = changed()
    del cfg["optim"]["b2"]
    with pytest.raises(ValueError, match=r"config: key 'optim.b2' is missing"):
        config.check(cfg)


def test_model_keys_are_those_of_the_dataclass():
    options = {"side": 4, "channels": 3, "width": 64, "layers": [1, 2]}
    assert config.build(FlowConfig, options, "model") == FlowConfig(4, 3, 64, (1, 2))
    with pytest.raises(ValueError, match=r"unknown key 'model.widht'; did you mean 'width'\?"):
        config.build(FlowConfig, {**options, "widht": 3}, "model")
    del options["layers"]
    with pytest.raises(ValueError, match=r"key 'model.layers' is missing"):
        config.build(FlowConfig, options, "model")


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("model.start", "sos", "model.start='sos' is not one of"),
        ("model.start", "prefix", "model.start='prefix' needs text: model.text_channels is 0"),
        ("model.text_channels", 8, "model.text_channels and model.text_length are both 0 or both"),
        ("model.positions", "none", "model.positions='none' is not one of"),
        ("model.kv_heads", 2, "heads=3 is not a multiple of kv_heads=2"),
        ("model.head_dim", 2, "model.head_dim=2 leaves no RoPE pairs"),
        ("image.pixels", 31, "image.pixels=31 is not model.side=8 x image.patch=2"),
        ("model.channels", 48, "model.channels=48 must be 3 x image.patch^2 = 12"),
        ("train.trainable", ["flow", "vlm"], "no subtree 'vlm'; there are flow"),
        ("train.batch_size", 20, "train.batch_size=20 is not divisible by data x fsdp = 8 x 1 = 8"),
        ("train.microbatches", 16, "rows of a microbatch=4 is not divisible by data x fsdp"),
        ("layout", "ddp", "layout: 'ddp' is not one of dp, fsdp, tp, fsdp_tp"),
    ],
)
def test_what_only_the_built_model_can_tell(key, value, words):
    cfg = config.to_dict(experiment("tarflow_pixels:tiny"))
    if key == "model.head_dim":
        cfg["model"]["positions"] = "rope"
    group, last = key.split(".") if "." in key else (None, key)
    (cfg[group] if group else cfg)[last] = value
    config.check(cfg)
    with pytest.raises(ValueError) as error:
        program = registry.build(cfg, mesh.make_mesh(cfg["mesh"]))
        program.lower_step()
    assert words in str(error.value)


WRONG = [float("nan"), float("inf"), -1, 10**18, 10**5000, True, "x", None, [1], {}, "\0"]


@pytest.mark.fast
@pytest.mark.parametrize("key", sorted(config.KEYS))
def test_every_key_has_a_check(key):
    """A key takes at most the three of these values that are of its type."""
    taken = [value for value in WRONG if config.KEYS[key].is_valid(value)]
    assert len(taken) <= 3, taken
    assert not any(value is None and key != "noise.context_sigma" for value in taken)


@pytest.mark.fast
@pytest.mark.parametrize("kind", [FlowConfig, QwenConfig, VisionConfig, FAEConfig, DinoConfig])
def test_every_field_of_a_model_has_a_check(kind):
    for field in dataclasses.fields(kind):
        wrong = [v for v in WRONG if not (v is None and field.default is None)]
        if field.type is str:
            wrong = [v for v in wrong if v != "x"]  # not of this name; the dataclass knows them
        if field.type is bool:
            wrong = [v for v in wrong if v is not True]
        for value in wrong:
            if value == [1] and "tuple" in str(field.type):
                continue
            with pytest.raises(ValueError, match=rf"^config: model\.{field.name}=.* must be "):
                checks.check_fields(kind, {field.name: value}, "config: model")
    with pytest.raises(ValueError, match=r"layers=\[-1\] must be a list of items, each a whole"):
        checks.check_fields(FlowConfig, {"layers": [-1]}, "config: model")
    checks.check_fields(FlowConfig, {"layers": [0, 2], "classes": 0, "kv_heads": None}, "m")


MODELS = {"flow": "tarflow_pixels", "starflow2": "stage3_joint", "vlm": "vlm_tiny",
          "fae": "fae_features", "codec": "fae_end_to_end"}  # fmt: skip


@pytest.mark.parametrize(
    "model, key, value, words",
    [
        ("flow", "model.layers", [], "model.layers is empty"),
        ("flow", "model.layers", 3, "model.layers=3 must be a list of items, each a whole number"),
        ("flow", "model.width", 1.5, "model.width=1.5 must be a whole number from 1"),
        ("flow", "model.heads", 0, "model.heads=0 must be a whole number from 1 to 2147483647"),
        ("flow", "model.head_dim", 10**6, "heads=0 must be at least 1"),
        ("flow", "model.compute_dtype", "fp8", "model.compute_dtype='fp8' must be one of"),
        ("starflow2", "model.vlm", 3, "model.vlm=3 must be a group of keys"),
        ("starflow2", "model.flow", [1], "model.flow=[1] must be a group of keys"),
        ("starflow2", "model.flow.layers", True, "model.flow.layers=True must be a list"),
        ("vlm", "model.rope_base", 0, "rope_base=0 must be above 1"),
        ("starflow2", "model.kind", ["mot"], "model.kind=['mot'] is not one of"),
        ("vlm", "model.vision", 3, "model.vision=3 must be a group of keys"),
        ("vlm", "model.vision.remat", "x", "vision remat='x' is not one of"),
        ("fae", "model.decoder_heads", -1, "model.decoder_heads=-1 must be a whole number"),
        ("codec", "teacher.tower.width", None, "teacher.tower.width=None must be a whole number"),
    ],
)
def test_wrong_values_of_a_model_are_named(model, key, value, words):
    cfg = config.to_dict(experiment(f"{MODELS[model]}:tiny"))
    *path, last = key.split(".")
    group = cfg
    for name in path:
        group = group[name]
    group[last] = value
    with pytest.raises(ValueError) as error:
        config.check(cfg)
        registry.make_task(cfg, dry_run=True)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("model.width", 2**30, "GiB of memory (the state"),
        ("train.batch_size", 2**30, "a batch of 1073741824 rows"),
        ("evaluate.batch_size", 2**30, "evaluation of 1073741824 rows"),
        ("sample.count", 2**30, "a grid of 1073741824 samples"),
    ],
)
def test_sizes_beyond_the_memory_are_refused(key, value, words):
    cfg = config.to_dict(experiment("tarflow_pixels:tiny"))
    group, last = key.split(".")
    cfg[group][last] = value
    config.check(cfg)
    task = registry.make_task(cfg)
    with pytest.raises(ValueError, match="config: the run needs at least") as error:
        check_memory(cfg, task, memory.capacity())
    assert words in str(error.value) and "more than there is" in str(error.value)
    if key == "model.width":
        with pytest.raises(ValueError, match="more than any machine has"):
            registry.build(cfg, mesh.make_mesh(cfg["mesh"]))


def test_differences_name_keys_of_the_model_too():
    old, new = changed(), changed(**{"optim.lr": 3e-4, "model.width": 8, "name": "other"})
    del new["seed"]
    assert config.differences(old, old) == []
    assert config.differences(old, new) == [
        "model.width: '(absent)' -> 8",
        "optim.lr: 0.0001 -> 0.0003",
        "seed: 0 -> '(absent)'",
    ]
    # A tuple in Python is a list in the file.
    assert config.differences(config.default(), json.loads(json.dumps(old))) == []


@pytest.mark.fast
@pytest.mark.parametrize("name", VARIANTS + STAGES)
def test_experiments_pass_and_are_saved_as_json(name):
    cfg = experiment(name)
    config.check(cfg)
    plain = config.to_dict(cfg)
    assert json.loads(json.dumps(plain)) == plain
    assert plain["name"] == name.replace(":", "_")
    docs = (EXPERIMENTS / f"{name.split(':')[0]}.py").read_text().split('"""')[1]
    file = f"experiments/{name.split(':')[0]}.py"
    assert docs.startswith("python -m starflow2_jax.train --config " + file)
    assert f"\n    {name.split(':')[1]} " in docs


# The 3B model lowers under every layout in test_mesh.
@pytest.mark.parametrize("name", VARIANTS[:-1])
def test_experiments_lower_at_full_size(name):
    cfg = config.to_dict(experiment(name))
    program = registry.build(cfg, mesh.make_mesh(cfg["mesh"]))
    state, metrics = program.lower_step().out_info
    assert state.step.shape == () and metrics["loss"].dtype == "float32"
    rows = {leaf.shape[0] for leaf in program.abstract_batch.values()}
    assert rows == {cfg["train"]["batch_size"]}


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--config={}:huge"], "--config: {} has no variant 'huge'"),
        (["--config", "{}:huge"], "--config: {} has no variant 'huge'"),
        (["--config={}:tiny", "--config.optim.rl=1"],
         "config: unknown key 'optim.rl'; did you mean 'optim.lr'?"),
        (["--config={}:tiny", "--config.drop.condition=0"],
         "config: key 'drop.condition' is now called 'cfg_dropout.text'"),
        (["--config={}:tiny", "--config.model.widht", "1"],
         "config: the experiment does not set 'model.widht'; only its file can add it"),
    ],
)  # fmt: skip
def test_a_wrong_key_or_variant_on_the_command_line_is_one_line(words, expected, monkeypatch):
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    path = str(EXPERIMENTS / "tarflow_pixels.py")
    argv = ["train", *(word.format(path) for word in words)]
    monkeypatch.setattr(sys, "argv", argv)  # where config_flags looks for overrides
    with pytest.raises((AttributeError, KeyError)) as error:
        values(argv)
    assert cli.explain(argv, error.value) == expected.format(path)
    assert cli.explain(argv[:1], error.value) == ""


def test_keys_that_are_words_of_python_can_be_given(monkeypatch):
    words = [
        "--config=FILE:from.x",
        "--config.init.from=runs/a.b",
        "--config.optim.lr=1",
        "--x.from",
    ]
    assert [cli.quote_keywords(word) for word in words] == [
        *("--config=FILE:from.x", "--config.init['from']=runs/a.b", "--config.optim.lr=1"),
        "--x.from",
    ]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    path = str(EXPERIMENTS / "tarflow_pixels.py")
    argv = [cli.quote_keywords(word) for word in ("train", f"--config={path}", words[1])]
    monkeypatch.setattr(sys, "argv", argv)
    values(argv)
    assert values.config.init["from"] == "runs/a.b"


def test_the_command_ends_with_that_line():
    words = ["--config=experiments/tarflow_pixels.py:tiny", "--config.optim.rl=1", "--dry_run"]
    ran = subprocess.run(
        [sys.executable, "-m", "starflow2_jax.train", *words],
        cwd=EXPERIMENTS.parent,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 1 and ran.stdout == ""
    assert ran.stderr == "error: config: unknown key 'optim.rl'; did you mean 'optim.lr'?\n"


def test_settings_that_every_causal_model_shares():
    cfg = config.to_dict(config.default())
    assert config.model_group(cfg) == {}
    cfg |= {"compute_dtype": "bfloat16", "attention": "splash", "model": {"side": 2}}
    expected = {"side": 2, "compute_dtype": "bfloat16", "attention": "splash"}
    assert config.model_group(cfg) == expected
    del cfg["attention"]  # saved before there was a choice
    assert "attention" not in config.model_group(cfg)


def old_names(cfg):
    """Return a configuration as it was stored before its keys got their present names."""
    old = json.loads(json.dumps(cfg))
    for name, new_name in config.RENAMED.items():
        (group, key), (new_group, new_key) = name.split("."), new_name.split(".")
        old.setdefault(group, {})[key] = old[new_group].pop(new_key)
        if not old[new_group]:
            del old[new_group]
    return old


def without_added(group, values):
    prefix = f"{group}." if group else ""
    return {
        key: without_added(key, value) if isinstance(value, dict) and not group else value
        for key, value in values.items()
        if f"{prefix}{key}" not in config.ADDED
    }


@pytest.mark.fast
def test_a_configuration_from_before_the_renaming_is_read():
    old = json.loads((GOLDEN / "config_before_renaming.json").read_text())
    cfg = config.upgrade(old)
    config.check(cfg)
    assert set(config.flat(cfg)) == set(config.KEYS) and config.upgrade(cfg) == cfg
    for name in config.ADDED:
        assert config.flat(cfg)[name] == config.KEYS[name].default
    assert old_names(without_added("", cfg)) == old
    assert cfg["train"]["trainable"] == ["adapter", "shallow", "deep", "skip"]
    assert cfg["cfg_dropout"] == {"text": 0.1, "all": 0.0} and "drop" not in cfg


def test_runs_and_folders_from_before_the_renaming_are_read(tmp_path):
    """Their files hold the old keys; every reader gives the present ones."""
    cfg = changed(**{"data.blank_images": True, "train.trainable": ["flow"]})
    writer = orbax.open(tmp_path / "run")
    state = {"params": {"a": np.ones(2, np.float32)}, "ema": {"a": np.ones(2, np.float32)}}
    orbax.save(writer, 1, state, {"config": old_names(cfg), "step": 1})
    orbax.close(writer)
    run_log.save_config(tmp_path / "run", old_names(cfg))
    model_folder.write_folder(tmp_path / "folder", state["ema"], old_names(cfg))
    assert run_log.read_config(tmp_path / "run") == cfg
    assert orbax.read_meta(tmp_path / "run")["config"] == cfg
    assert open_model(tmp_path / "run").config == cfg
    assert model_folder.read_config(tmp_path / "folder") == cfg
    assert config.differences(run_log.read_config(tmp_path / "run"), cfg) == []


def test_the_group_of_an_unknown_key_is_guessed_too():
    assert "did you mean 'model.width'?" in config.unknown_key("modle.width")
    assert "did you mean 'train.steps'?" in config.unknown_key("trian.steps")
