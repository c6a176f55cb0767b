"""Decoding on eight devices equals that on one."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers import tiny_decode_model
from helpers.tiny_decode_model import image_part

from starflow2_jax import params
from starflow2_jax.mesh import cache_sharding, make_mesh

PROMPTS = [["ab", image_part(1)], "c", "draw", [image_part(2), "d?"], "e", "f", "so?", "aab"]
DRAW = {"images": 2, "max_tokens": 6, "temperature": 0.9, "guidance": 1.5, "seed": 3}


@pytest.fixture(scope="module")
def model():
    return tiny_decode_model.model()


def sharded(model, sizes, layout):
    """Return the model on a mesh; only weights that the mesh divides are sharded."""
    mesh = make_mesh(sizes)
    shardings = params.shardings(model.model_config.declare(), mesh, layout)
    return dataclasses.replace(model, params=jax.device_put(model.params, shardings))


@pytest.mark.parametrize("sizes", ["fsdp=8", "data=2,fsdp=4"])
def test_rows_on_eight_devices_are_those_of_one(model, sizes):
    expected = model.generate(PROMPTS, **DRAW)
    result = sharded(model, sizes, "fsdp").generate(PROMPTS, **DRAW)
    for row, expected_row in zip(result, expected, strict=True):
        assert [p.kind for p in row] == [p.kind for p in expected_row]
        for part, other in zip(row, expected_row):
            assert part.tokens == other.tokens and part.text == other.text
            np.testing.assert_allclose(part.log_likelihood, other.log_likelihood, rtol=1e-3)
            if part.kind == "image":
                np.testing.assert_allclose(part.latent, other.latent, atol=1e-3)
    keys = result.session.state.caches[0].keys[0]
    assert keys.sharding.shard_shape(keys.shape)[0] == len(keys) // 8  # two branches


@pytest.mark.fast
def test_caches_are_cut_by_rows_and_heads():
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    cut = lambda *shape: cache_sharding(shape, mesh).shard_shape(shape)
    assert cut(8, 4, 64, 16) == (2, 2, 64, 16)
    assert cut(6, 3, 64, 16) == (6, 3, 64, 16)  # neither is divided
    assert cut(4, 64, 16) == (2, 64, 16)  # a single row
