"""The training of a model that reads: every gradient where it belongs, equal on every mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import interleaved_dataset

from starflow2_jax import config, mesh
from starflow2_jax.checkpoints import orbax
from starflow2_jax.evaluation import vqa
from starflow2_jax.inference import vlm as readers
from starflow2_jax.models import attention, qwen, qwen_vision
from starflow2_jax.params import init as init_params
from starflow2_jax.training.losses import text, vlm as vlm_loss
from starflow2_jax.training.program import to_device
from starflow2_jax.training.tasks import registry, vlm

ROWS, SOME = 8, 4
MODEL = qwen.QwenConfig(
    vocab=400, width=32, layers=2, heads=4, kv_heads=2, mlp_width=48, sections=(1, 1, 2), tied=True,
    rope_base=50.0, vision_start_token=3, vision_end_token=4, image_token=5, video_token=6,
    vision=qwen_vision.VisionConfig(
        depth=2, width=16, heads=2, mlp_width=24, out_width=32, full_layers=(1,), patch=8, merge=1,
        window=16,
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    tasks_ = ["question", "caption", "dialog", "text", "multi"]
    return interleaved_dataset.make(tmp_path_factory.mktemp("vlm"), 40, tasks=tasks_)


def experiment(folders, **changes):
    """16 pixels: 2 x 2 features an image."""
    cfg = config.default()
    cfg.task = "vlm"
    cfg.model.update(dataclasses.asdict(MODEL))
    cfg.image.pixels, cfg.text.length, cfg.text.images = 16, 224, 3
    cfg.data.path = cfg.eval_data.path = folders[0]
    cfg.text.tokenizer, cfg.data.threads = folders[1], 1
    cfg.noise.kind, cfg.cfg_dropout.text = "none", 0.0
    cfg.train.trainable = ("vlm", "pixel_probe")
    cfg.train.batch_size, cfg.train.steps, cfg.train.ema = ROWS, 12, 0.9
    cfg.optim.lr, cfg.optim.warmup, cfg.optim.muon_lr, cfg.sample.every = 3e-3, 2, 1e-2, 0
    cfg.vlm.region_loss_weight = 0.1
    cfg.update_from_flattened_dict(changes)
    return config.to_dict(cfg)


def batches(cfg, count):
    task = registry.make_task(cfg)
    stream = task.reader.batches(task.data_options("data"), batch_size=ROWS)
    return [next(stream) for _ in range(count)]


def run(cfg, steps=SOME, devices=None):
    """(losses of all steps, state after some, program)."""
    grid = mesh.make_mesh(cfg["mesh"], devices or jax.devices()[:1])
    with jax.set_mesh(grid):
        program = registry.build(cfg, grid)
        state, frozen = program.init(jax.random.key(cfg["seed"]))
        losses = []
        for batch in batches(cfg, steps):
            state, metrics = program.step(state, frozen, to_device(program, batch))
            losses.append(float(metrics["loss"]))
            if len(losses) == SOME:
                middle_state = jax.tree.map(jnp.copy, state)
    return np.array(losses), middle_state, program


@pytest.fixture(scope="module")
def trained(folders):
    """(losses of all steps, state after some) on one device."""
    return run(experiment(folders), 12)[:2]


def test_it_learns(trained):
    losses = trained[0]
    assert losses[-1] < losses[0] - 0.5


def test_eight_devices_and_microbatches_equal_one_device(folders, trained):
    one, state = trained[0][:SOME], trained[1]
    changes = {"layout": "fsdp_tp", "mesh": "data=2,fsdp=2,tensor=2"}
    for options, devices in ((changes, jax.devices()[:8]), ({"train.microbatches": 2}, None)):
        other, moved, _ = run(experiment(folders, **options), devices=devices)
        np.testing.assert_allclose(other, one, rtol=1e-5)
        a, b = (jax.tree.leaves(jax.device_get(s.params)) for s in (state, moved))
        assert max(np.abs(x - y).max() for x, y in zip(a, b)) < 2e-4


def test_the_tower_alone_leaves_the_language_as_it_was(folders):
    cfg = experiment(folders, **{"vlm.text_loss_weight": 0.0, "optim.weight_decay": 0.0})
    _, state, program = run(cfg)
    first = program.init(jax.random.key(cfg["seed"]))[0].params
    same = jax.tree.map(lambda a, b: bool((a == b).all()), first["vlm"], state.params["vlm"])
    assert not any(jax.tree.leaves(same.pop("vision")["layers"]["mlp_up"]))
    # The head reads the words of regions; the layers between are not run.
    assert same.pop("embed") == {"weight": False}
    assert same.pop("final_norm") == {"weight": False}
    assert all(jax.tree.leaves(same))


def test_the_language_alone_leaves_the_tower_as_it_was(folders):
    cfg = experiment(folders, **{"vlm.train_tower": False, "optim.weight_decay": 0.1})
    _, state, program = run(cfg)
    first = program.init(jax.random.key(cfg["seed"]))[0].params
    same = jax.tree.map(lambda a, b: bool((a == b).all()), first["vlm"], state.params["vlm"])
    assert all(jax.tree.leaves(same.pop("vision")))
    assert not any(jax.tree.leaves(same["layers"]["mlp_up"]))


def test_words_are_named_by_the_features_of_their_region(folders):
    """Moving features outside of all regions changes nothing; each region's name its own words."""
    rng = np.random.default_rng(0)
    region = np.full((ROWS, 3, 4), -1, np.int32)
    region[:, 0, 1], region[:, 0, 3] = 0, 2
    words = np.full((ROWS, 3, 5, 8), -1, np.int32)
    words[:, 0, 0, :2], words[:, 0, 2, :1] = [7, 9], [11]
    batch = {"region": jnp.asarray(region), "region_words": jnp.asarray(words)}
    params = init_params(jax.random.key(0), vlm.declare(MODEL)["vlm"])
    features = jnp.asarray(rng.normal(size=(ROWS, 3, 4, 32)).astype(np.float32))
    grad = jax.grad(lambda s: vlm_loss.region_nll(params, batch, s, MODEL).sum())(features)
    has_gradient = np.abs(np.asarray(grad)).max(-1) > 0
    np.testing.assert_array_equal(has_gradient, region >= 0)
    states = features / jnp.sqrt(jnp.square(features).mean(-1, keepdims=True) + MODEL.norm_eps)
    log_probs = jax.nn.log_softmax(states @ params["embed"]["weight"].T)[0, 0]
    expected = -(log_probs[1, [7, 9]].mean() + log_probs[3, 11]) / 2
    nll = vlm_loss.region_nll(params, batch, features, MODEL)
    np.testing.assert_allclose(nll[0], expected, rtol=1e-5)


def test_sums_of_text_are_those_of_each_record(folders):
    batch = {k: jnp.asarray(v) for k, v in batches(experiment(folders), 1)[0].items() if k != "id"}
    logits = jax.random.normal(jax.random.key(0), (ROWS, 223, 400))
    sums = text.row_sums(logits, batch)
    record_sums = text.record_sums(logits, batch)
    for row_name, part in (("tokens", "tokens"), ("nll", "nll")):
        np.testing.assert_allclose(sums[row_name], record_sums[part].sum(1), rtol=1e-5)
    expected = batch["ids"][:, 1:]
    perfect = 1e3 * jax.nn.one_hot(expected, 400)
    right = text.row_sums(perfect, batch)
    np.testing.assert_array_equal(right["records_right"], right["records"])
    # One wrong token spoils its record alone.
    row, position = np.argwhere(np.asarray(text.targets(batch)))[0]
    spoilt = text.row_sums(perfect.at[row, position].set(0.0).at[row, position, 0].set(1.0), batch)
    assert float((right["records_right"] - spoilt["records_right"]).sum()) == 1


@pytest.mark.fast
def test_segments_and_the_mask_are_one(folders):
    """`segments` of the layers equal their mask."""
    batch = batches(experiment(folders), 1)[0]
    params = init_params(jax.random.key(0), qwen.declare(MODEL))
    h = jax.random.normal(jax.random.key(1), (ROWS, 224, 32))
    segments = jnp.asarray(batch["segments"])
    a, _ = qwen.apply_layers(params, h, MODEL, batch["positions"], segments=segments)
    b, _ = qwen.apply_layers(params, h, MODEL, batch["positions"], attention.segment_mask(segments))
    np.testing.assert_allclose(a[segments > 0], b[segments > 0], atol=1e-5)


def test_an_exported_reader_answers_like_its_run(folders, trained, tmp_path):
    cfg, state = experiment(folders), trained[1]
    run_folder = tmp_path / "run"
    writer = orbax.open(run_folder, keep=1)
    meta = {
        "config": cfg,
        "step": SOME,
        "data": {},
        "classes": None,
        "null_text": None,
        "frozen": {},
    }
    orbax.save(writer, SOME, state, meta)
    orbax.close(writer)
    first = readers.load(str(run_folder))
    readers.export(first, str(tmp_path / "out"))
    second = readers.load(str(tmp_path / "out"))
    assert second.model_config == first.model_config
    assert second.tokenizer_folder == str(tmp_path / "out")
    answers = []
    for loaded in (first, second):
        options = vlm.data_options(
            loaded.cfg, loaded.model_config, tokenizer=loaded.tokenizer_folder, threads=1
        )
        score = lambda batch, loaded=loaded: readers.score(loaded, batch)
        answers.append(vqa.score_answers(score, options, batch_size=4))
    # One answer a record that has words to learn, whatever rows it shares.
    assert len(answers[0]) == 40 and answers[0] == answers[1]
    table = vqa.summarize(answers[0])
    assert table["all"]["count"] == 40 and 0 < table["all"]["most_frequent"] < 1
    small = tmp_path / "small"
    readers.export(first, str(small), dtype="bfloat16")
    assert readers.load(str(small)).params["embed"]["weight"].dtype == jnp.float32
    with pytest.raises(ValueError, match="a folder that `convert export` made of one"):
        readers.load(other_folder(tmp_path, first))


def other_folder(tmp_path, reader):
    """A public folder without the experiment."""
    from starflow2_jax.checkpoints.convert import qwen as table

    path = tmp_path / "other"
    table.export(jax.device_get(reader.params), reader.model_config, path)
    return str(path)


@pytest.mark.fast
def test_wrong_experiments_are_named(folders):
    grid = mesh.make_mesh("data=-1", jax.devices()[:1])
    with pytest.raises(ValueError, match=r"model\.vision is missing"):
        vlm.model_config({**experiment(folders), "model": {"vocab": 3}})
    with pytest.raises(ValueError, match="vision tower needs multiples of 8"):
        vlm.model_config(experiment(folders, **{"image.pixels": 20}))
    with pytest.raises(ValueError, match="this task trains exactly"):
        registry.build(experiment(folders, **{"train.trainable": ("vlm",)}), grid)
