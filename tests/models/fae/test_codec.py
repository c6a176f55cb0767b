"""The latent codec: parameters at paper size, its functions in closed form, and learning."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from starflow2_jax.checkpoints.convert import lpips
from starflow2_jax.mesh import LAYOUTS, batch_sharding, make_mesh
from starflow2_jax.models.fae import codec, discriminator, losses, perceptual
from starflow2_jax.params import (
    abstract as abstract_params,
    count as count_params,
    flatten,
    init as init_params,
    shardings as param_shardings,
    split as split_params,
)

PAPER = codec.preset("paper", compute_dtype="bfloat16")
TOY = codec.preset(
    "tiny",
    feature_width=24,
    side=4,
    latent=6,
    encoder_heads=2,
    encoder_head_dim=16,
    decoder_heads=2,
    decoder_head_dim=8,
    decoder_mlp=32,
    pixel_layers=2,
    pixel_width=32,
    pixel_heads=2,
    pixel_mlp=40,
    patch=4,
)
CRITIC = discriminator.DiscriminatorConfig(widths=(8, 16), groups=4)


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda key: init_params(key, codec.declare(TOY)))(jax.random.key(0))


@pytest.fixture(scope="module")
def features():
    """Features of rank 3 in 24 channels."""
    factors = jax.random.normal(jax.random.key(1), (4, TOY.tokens, 3))
    return factors @ jax.random.normal(jax.random.key(2), (3, TOY.feature_width))


def keys(seed, rows=4):
    return jax.random.split(jax.random.key(seed), rows)


# ------------------------------------------------------------------------------- sizes and layouts


def test_paper_counts():
    """The paper's 38.17 M, 170.43 M and 305.36 M."""
    declared = codec.declare(codec.preset("paper"))
    counts = {name: count_params(tree) for name, tree in declared.items()}
    assert counts == {
        "encoder": 38_166_592,
        "feature_decoder": 170_428_416,
        "pixel_decoder": 305_360_896,
        "latent": 64,
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_paper_lowers_under_every_layout(layout):
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    params = abstract_params(codec.declare(PAPER), mesh, layout, jnp.bfloat16)
    shape = (8, PAPER.tokens, PAPER.feature_width)
    abstract_features = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=batch_sharding(mesh))

    def round_trip(params, features):
        mean, log_variance = codec.encode(params, features, PAPER)
        decoded = codec.decode_features(params, mean, PAPER)
        return log_variance, decoded, codec.decode_pixels(params, decoded, PAPER)

    with jax.set_mesh(mesh):
        out = jax.jit(round_trip).lower(params, abstract_features).out_info
    assert [o.shape for o in out] == [(8, 256, 32), (8, 256, 1536), (8, 256, 256, 3)]
    assert {o.dtype for o in out} == {jnp.dtype(jnp.float32)}


def test_layouts_give_the_numbers_of_one_device(params, features):
    mesh = make_mesh("data=2,fsdp=2,tensor=2")

    def round_trip(params, features):
        mean, log_variance = codec.encode(params, features, TOY)
        decoded = codec.decode_features(params, mean, TOY)
        return log_variance, decoded, codec.decode_pixels(params, decoded, TOY)

    single_device = jax.jit(round_trip)(params, features)
    shardings = param_shardings(codec.declare(TOY), mesh, "fsdp_tp")
    placed = jax.device_put(features, batch_sharding(mesh))
    with jax.set_mesh(mesh):
        sharded = jax.jit(round_trip)(jax.device_put(params, shardings), placed)
    for a, b in zip(single_device, sharded):
        np.testing.assert_allclose(a, b, atol=1e-5)


# ------------------------------------------------------------------------------------- the encoder


@pytest.mark.fast
def test_encoder_by_hand(params, features):
    """Softmax attention of every head, plus the parallel linear, GELU, head; in float64."""
    encoder = {k: np.asarray(v, np.float64) for k, v in flatten(params["encoder"]).items()}
    x = np.asarray(features, np.float64)
    linear = lambda name, x: x @ encoder[f"{name}/weight"] + encoder[f"{name}/bias"]
    q, k, v = (linear(n, x) for n in ("query", "key", "value"))
    heads = []
    for h in range(TOY.encoder_heads):
        channels = slice(h * TOY.encoder_head_dim, (h + 1) * TOY.encoder_head_dim)
        scores = (
            q[..., channels] @ k[..., channels].swapaxes(1, 2) / math.sqrt(TOY.encoder_head_dim)
        )
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        heads.append(scores / scores.sum(-1, keepdims=True) @ v[..., channels])
    summed = np.concatenate(heads, -1) + linear("parallel", x)
    erf = np.vectorize(math.erf)
    out = linear("head", summed * 0.5 * (1 + erf(summed / math.sqrt(2))))
    mean, log_variance = codec.posterior(params, features, TOY)
    np.testing.assert_allclose(mean, out[..., :6], atol=1e-5)
    np.testing.assert_allclose(log_variance, out[..., 6:], atol=1e-5)


def test_encoder_takes_any_length_but_its_own_width(params):
    mean, _ = codec.encode(params, jnp.ones((1, 7, 24)), TOY)
    assert mean.shape == (1, 7, 6)
    with pytest.raises(ValueError, match="23 channels, expected 24"):
        codec.encode(params, jnp.ones((1, 7, 23)), TOY)
    with pytest.raises(ValueError, match="7 tokens, expected 4 x 4"):
        codec.decode_features(params, mean, TOY)
    with pytest.raises(ValueError, match="7 tokens, expected 4 x 4"):
        codec.decode_pixels(params, jnp.ones((1, 7, 24)), TOY)


def test_bad_configs():
    with pytest.raises(ValueError, match="preset 'huge' is not one of paper, tiny"):
        codec.preset("huge")
    for change, words in (
        ({"activation": "relu"}, "activation='relu'"),
        ({"remat": "some"}, "remat='some'"),
        ({"pixel_heads": 3}, "pixel_width=32 is not a multiple of pixel_heads=3"),
        ({"decoder_head_dim": 6}, "decoder_head_dim=6"),
    ):
        with pytest.raises(ValueError, match=words):
            dataclasses.replace(TOY, **change)


def test_posterior_sample():
    """A sample is mean + std noise, and the noise of a row does not depend on the batch."""
    mean = jnp.arange(4.0)[:, None, None] * jnp.ones((4, 1000, 6))
    log_variance = jnp.full_like(mean, 2 * math.log(0.3))
    sampled = codec.sample(keys(0), mean, log_variance)
    noise = jax.vmap(lambda key: jax.random.normal(key, (1000, 6)))(keys(0))
    np.testing.assert_allclose(sampled, mean + 0.3 * noise, atol=1e-6)
    alone = codec.sample(keys(0)[2:3], mean[2:3], log_variance[2:3])
    np.testing.assert_array_equal(alone[0], sampled[2])
    np.testing.assert_allclose((sampled - mean).std(), 0.3, rtol=0.02)


def test_statistics_normalize_latents(params, features):
    """Measured statistics give samples unit variance and do not change what is decoded."""
    mean, log_variance = codec.posterior(params, features, TOY)
    parts = [codec.moments(mean[i : i + 2], log_variance[i : i + 2]) for i in (0, 2)]
    sums = jax.tree.map(lambda a, b: a + b, *parts)
    average = sums["sum"] / sums["count"]
    std = jnp.sqrt(sums["square"] / sums["count"] - average**2)
    measured = {**params, "latent": {"mean": average, "std": std}}
    unit, narrow = codec.encode(measured, features, TOY)
    sums = codec.moments(unit, narrow)
    np.testing.assert_allclose(sums["sum"] / sums["count"], 0, atol=1e-5)
    np.testing.assert_allclose(sums["square"] / sums["count"], 1, rtol=1e-5)
    np.testing.assert_allclose(codec.denormalize(measured, unit, TOY), mean, atol=1e-5)
    expected = codec.decode_features(params, codec.encode(params, features, TOY)[0], TOY)
    np.testing.assert_allclose(codec.decode_features(measured, unit, TOY), expected, atol=1e-4)


# ----------------------------------------------------------------------------------------- losses


@pytest.mark.fast
def test_kl_closed_form():
    """Against torch's formula by hand, by Monte Carlo, and zero for the prior."""
    mean, variance = 0.7, 0.3
    shape = (2, 3, 5)
    actual = losses.kl(jnp.full(shape, mean), jnp.full(shape, math.log(variance)))
    one = 0.5 * (mean**2 + variance - 1 - math.log(variance))
    np.testing.assert_allclose(actual, 15 * one, rtol=1e-6)
    x = np.random.default_rng(0).normal(mean, variance**0.5, 400_000)
    sampled = np.mean(0.5 * (x**2 - (x - mean) ** 2 / variance - math.log(variance)))
    np.testing.assert_allclose(one, sampled, rtol=0.02)
    np.testing.assert_array_equal(losses.kl(jnp.zeros(shape), jnp.zeros(shape)), 0)


def test_feature_loss_parts(params, features):
    run = jax.jit(losses.feature_loss, static_argnums=3, static_argnames="sigma")
    loss, parts = run(params, features, keys(3), TOY, beta=1e-2)
    np.testing.assert_allclose(loss, parts["mean_square"] + 1e-2 * parts["kl"], rtol=1e-6)
    np.testing.assert_allclose(
        parts["kl"], losses.kl(*codec.posterior(params, features, TOY)), rtol=1e-6
    )
    noisy, _ = run(params, features, keys(3), TOY, beta=1e-2, sigma=3.0)
    assert (jnp.abs(noisy - loss) > 1e-4).all()
    one, _ = run(params, features[1:2], keys(3)[1:2], TOY, beta=1e-2)
    np.testing.assert_allclose(one[0], loss[1], rtol=1e-5)


def test_noise():
    x = jnp.zeros((4, 500, 3))
    out = losses.add_noise(keys(5), x, jnp.array([0.0, 0.4, 1.0, 2.0]))
    np.testing.assert_allclose(out.std((1, 2)), [0, 0.4, 1, 2], rtol=0.05)
    assert codec.preset("paper").noise == 0.4


@pytest.mark.fast
def test_hinge_and_lecam_by_hand():
    real = jnp.array([[[2.0, 0.5]], [[-1.0, 1.0]]])
    fake = jnp.array([[[-3.0, 0.5]], [[0.0, -0.5]]])
    np.testing.assert_allclose(
        discriminator.hinge_loss(real, fake),
        [0.5 * ((0 + 0.5) / 2 + (0 + 1.5) / 2), 0.5 * ((2 + 0) / 2 + (1 + 0.5) / 2)],
    )
    np.testing.assert_allclose(discriminator.generator_loss(fake), [1.25, 0.25])
    running = {"real": jnp.array(0.25), "fake": jnp.array(-0.5)}
    np.testing.assert_allclose(
        discriminator.lecam_penalty(running, real, fake),
        [
            (2.5**2 + 1.0**2) / 2 + (3.25**2 + 0) / 2,
            (0 + 1.5**2) / 2 + (0.25**2 + 0.75**2) / 2,
        ],
    )
    updated = discriminator.lecam_update(running, real, fake, decay=0.9)
    np.testing.assert_allclose(updated["real"], 0.25 * 0.9 + 0.1 * 0.625, rtol=1e-6)
    np.testing.assert_allclose(updated["fake"], -0.5 * 0.9 + 0.1 * -0.75, rtol=1e-6)
    assert set(discriminator.lecam_start()) == {"real", "fake"}


def test_discriminator(params):
    declared = discriminator.declare(CRITIC)
    critic = init_params(jax.random.key(0), declared)
    images = jax.random.normal(jax.random.key(1), (3, 16, 16, 3))
    logits = discriminator.forward(critic, images, CRITIC)
    assert logits.shape == (3, 4, 4) and logits.dtype == jnp.float32
    # Rows do not depend on one another.
    np.testing.assert_allclose(
        discriminator.forward(critic, images[1:2], CRITIC)[0], logits[1], atol=1e-6
    )
    assert count_params(discriminator.declare(discriminator.DiscriminatorConfig())) == 2_762_945
    with pytest.raises(ValueError, match="multiples of groups=32"):
        discriminator.DiscriminatorConfig(widths=(8, 40))
    arguments = (critic, images, images + 1, discriminator.lecam_start(), CRITIC)
    loss, parts = losses.discriminator_loss(*arguments, lecam=0.5)
    np.testing.assert_allclose(loss, parts["hinge"] + 0.5 * parts["lecam"], rtol=1e-6)
    np.testing.assert_allclose(parts["real"], logits.mean((1, 2)), rtol=1e-5)
    into_fake = jax.grad(
        lambda fake: losses.discriminator_loss(arguments[0], images, fake, *arguments[3:])[0].sum()
    )(images)
    assert not into_fake.any()


def test_pixel_loss(params, features):
    """Every weighted term counts by its weight and has a gradient to every parameter."""
    image = jnp.tanh(jax.random.normal(jax.random.key(4), (4, 16, 16, 3)))
    critic = init_params(jax.random.key(0), discriminator.declare(CRITIC))
    weights = losses.PixelWeights(l1=0.5, l2=2.0, perceptual=3.0, gan=0.25)
    functions = {
        "perceptual": lambda a, b: perceptual.token_distance([a[:, 0]], [b[:, 0]]),
        "logits": lambda x: discriminator.forward(critic, x, CRITIC),
    }

    def loss(decoder_params, weights=weights, **terms):
        terms = terms or functions
        full = {**params, "pixel_decoder": decoder_params}
        return losses.pixel_loss(full, features, image, keys(6), TOY, weights, **terms)

    rows, decoded, parts = loss(params["pixel_decoder"])
    by_hand = 0.5 * parts["l1"] + 2 * parts["l2"] + 3 * parts["perceptual"] + 0.25 * parts["gan"]
    np.testing.assert_allclose(rows, by_hand, rtol=1e-6)
    np.testing.assert_allclose(parts["l1"], jnp.abs(decoded - image).mean((1, 2, 3)), rtol=1e-5)
    gradients = jax.jit(jax.grad(lambda decoder_params: loss(decoder_params)[0].sum()))(
        params["pixel_decoder"]
    )
    without_gradient = [n for n, g in flatten(gradients).items() if not jnp.abs(g).max() > 0]
    # Softmax is blind to what adds the same to every score.
    assert without_gradient in ([], ["layers/key/bias"]), without_gradient
    plain = losses.PixelWeights(l1=1, l2=0, perceptual=0, gan=0)
    clean, _, parts = loss(params["pixel_decoder"], plain, sigma=0.0)
    assert set(parts) == {"l1", "count"}
    pixels = codec.decode_pixels(params, features, TOY)
    np.testing.assert_allclose(clean, losses.mean_absolute(pixels, image), rtol=1e-6)
    with pytest.raises(ValueError, match=r"weights.perceptual=1.0"):
        loss(params["pixel_decoder"], losses.PixelWeights(), logits=functions["logits"])


@pytest.mark.fast
def test_learns_in_a_few_steps(params, features):
    """A toy batch of features, then of pixels; every trained parameter has a gradient."""
    image = jnp.tanh(features[..., :3]).reshape(4, 4, 4, 3).repeat(4, 1).repeat(4, 2)
    trained, fixed = split_params(params, ("encoder", "feature_decoder"))
    tx = optax.adam(1e-2)

    def features_loss(trainable, key):
        full = {**trainable, **fixed}
        row_keys = jax.random.split(key, 4)
        return losses.feature_loss(full, features, row_keys, TOY, beta=1e-5)[0].mean()

    def pixels_loss(trainable, key):
        full = {**params, "pixel_decoder": trainable}
        row_keys = jax.random.split(key, 4)
        weights = losses.PixelWeights(l2=1, perceptual=0, gan=0)
        return losses.pixel_loss(full, features, image, row_keys, TOY, weights)[0].mean()

    for loss, trainable in ((features_loss, trained), (pixels_loss, params["pixel_decoder"])):

        @jax.jit
        def step(trainable, state, key, loss=loss):
            value, gradients = jax.value_and_grad(loss)(trainable, key)
            updates, state = tx.update(gradients, state)
            return optax.apply_updates(trainable, updates), state, value, gradients

        state, values = tx.init(trainable), []
        for i in range(40):
            trainable, state, value, gradients = step(trainable, state, jax.random.key(i))
            values.append(float(value))
            if i == 0:
                flat = flatten(gradients)
                without_gradient = [n for n, g in flat.items() if not jnp.abs(g).max() > 0]
                assert all(n.endswith("key/bias") for n in without_gradient), without_gradient
        assert np.mean(values[-5:]) < 0.3 * values[0], values[::8]


# ------------------------------------------------------------------------------ perceptual distance


SMALL = perceptual.LPIPSConfig(widths=(4, 6, 8, 8, 6))


def public_lpips(cfg, lins=True):
    """A random state dict with the names of the lpips package, or of torchvision's VGG16."""
    draw = np.random.default_rng(0)
    index = {0: (0, 2), 1: (5, 7), 2: (10, 12, 14), 3: (17, 19, 21), 4: (24, 26, 28)}
    tensors, inputs = {}, 3
    for i, width in enumerate(cfg.widths):
        for j in index[i]:
            name = f"net.slice{i + 1}.{j}" if lins else f"features.{j}"
            tensors[f"{name}.weight"] = draw.normal(size=(width, inputs, 3, 3)) * 0.4
            tensors[f"{name}.bias"] = draw.normal(size=width) * 0.1
            inputs = width
        if lins:
            tensors[f"lin{i}.model.1.weight"] = draw.random((1, width, 1, 1))
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


def test_lpips_as_torch():
    torch = pytest.importorskip("torch")
    tensors = public_lpips(SMALL)
    cfg, tree = lpips.load(tensors)
    assert cfg == SMALL
    a, b = (
        np.random.default_rng(s).uniform(-1, 1, (2, 33, 20, 3)).astype(np.float32) for s in (1, 2)
    )

    def activations(image):
        # The constants of the lpips package.
        x = torch.from_numpy(image.transpose(0, 3, 1, 2).copy())
        shift, scale = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
        x = (x - torch.tensor(shift)[None, :, None, None]) / torch.tensor(scale)[
            None, :, None, None
        ]
        out = []
        for i in range(5):
            x = torch.nn.functional.max_pool2d(x, 2) if i else x
            for name in (
                n for n in tensors if n.startswith(f"net.slice{i + 1}.") and "w" in n[-6:]
            ):
                weight, bias = tensors[name], tensors[name.replace("weight", "bias")]
                x = torch.nn.functional.conv2d(
                    x, torch.from_numpy(weight), torch.from_numpy(bias), padding=1
                ).relu()
            out.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return out

    expected = 0
    for i, (x, y) in enumerate(zip(activations(a), activations(b))):
        channels = torch.from_numpy(tensors[f"lin{i}.model.1.weight"])
        square = torch.nn.functional.conv2d((x - y).square(), channels)
        expected = expected + square.mean((1, 2, 3))
    distance = jax.jit(perceptual.lpips)(tree, a, b)
    np.testing.assert_allclose(distance, expected.numpy(), rtol=1e-5)


def test_lpips_properties():
    _, tree = lpips.load(public_lpips(SMALL, lins=False))
    distance = jax.jit(perceptual.lpips)
    assert (tree["channels"]["2"] == 1).all()
    image = jnp.tanh(jax.random.normal(jax.random.key(0), (2, 16, 16, 3)))
    np.testing.assert_array_equal(distance(tree, image, image), 0)
    near, far = (distance(tree, image, jnp.clip(image + e, -1, 1)) for e in (0.02, 0.5))
    assert (near > 0).all() and (near < far).all()
    # Dead activations have no direction, and yet a gradient that is a number.
    dead = jax.tree.map(jnp.zeros_like, tree)
    slope = jax.jit(jax.grad(lambda x: perceptual.lpips(dead, x, image).sum()))(0 * image)
    assert jnp.isfinite(slope).all()
    with pytest.raises(ValueError, match="at least 16"):
        perceptual.lpips(tree, image[:, :8], image[:, :8])
    full = count_params(perceptual.declare(perceptual.LPIPSConfig()))
    assert full == 14_714_688 + sum((64, 128, 256, 512, 512))


def test_lpips_bad_files(tmp_path):
    good = public_lpips(SMALL)
    # The package's second names of the channel weights, as they stand in some files.
    second = {n.replace("lin", "lins.") if n.startswith("lin") else n: t for n, t in good.items()}
    again = lpips.load({**second, "scaling_layer.shift": np.zeros((1, 3, 1, 1))})[1]
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(lpips.load(good)[1])):
        np.testing.assert_array_equal(a, b)
    cut = {n: t for n, t in good.items() if n != "net.slice3.12.bias"}
    with pytest.raises(ValueError, match=r"1 missing: net\.slice3\.12\.bias"):
        lpips.load(cut)
    with pytest.raises(ValueError, match="1 unexpected: head"):
        lpips.load({**good, "head": np.zeros(2)})
    wrong = {**good, "net.slice2.5.weight": np.zeros((6, 5, 3, 3), np.float32)}
    with pytest.raises(
        ValueError, match=r"net\.slice2\.5\.weight is \[6, 5, 3, 3\], expected \[6, 4"
    ):
        lpips.load(wrong)
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        lpips.load(tmp_path / "none.safetensors")


def test_token_distance():
    a = jnp.array([[[3.0, 4.0], [1.0, 0.0]]])
    b = jnp.array([[[6.0, 8.0], [0.0, 5.0]]])
    # Length does not count; a right angle is a square of 2.
    np.testing.assert_allclose(perceptual.token_distance([a], [b]), [1.0], rtol=1e-6)
    np.testing.assert_allclose(perceptual.token_distance([a, a], [b, a]), [0.5], rtol=1e-6)
