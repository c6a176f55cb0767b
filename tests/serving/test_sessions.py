"""The memory of a server: kept conversations and images, of which the oldest go first."""

import numpy as np
import pytest

from starflow2_jax.inference.prompts import Part
from starflow2_jax.serving import content, image_store
from starflow2_jax.serving.errors import RequestError
from starflow2_jax.serving.image_store import ImageStore
from starflow2_jax.serving.sessions import SessionCache, SessionRows, prefix_keys

pytestmark = pytest.mark.fast


def test_keys_stand_for_prefixes_of_conversations():
    parts = [Part("text", "user", "a"), Part("image"), Part("text", "assistant", "b")]
    keys = prefix_keys(parts, ["1"])
    assert len(set(keys)) == 3 and prefix_keys(parts[:2], ["1"]) == keys[:2]
    assert prefix_keys(parts, ["2"])[0] == keys[0] and prefix_keys(parts, ["2"])[1] != keys[1]
    # Neither the role nor the border of two texts is lost.
    assert prefix_keys([Part("text", "system", "a")], []) != prefix_keys(parts[:1], [])
    ab, c = Part("text", "user", "ab"), Part("text", "user", "c")
    a, bc = Part("text", "user", "a"), Part("text", "user", "bc")
    assert prefix_keys([ab, c], [])[1] != prefix_keys([a, bc], [])[1]


def test_the_longest_prefix_counts_and_the_oldest_row_goes():
    cache, rows = SessionCache(2), [SessionRows({}) for _ in range(3)]
    cache.put("a", rows[0])
    cache.put("ab", rows[1])
    assert cache.find(["a", "ab", "abc"]) is rows[1] and cache.find(["a"]) is rows[0]
    cache.put("c", rows[2])
    assert len(cache) == 2 and cache.find(["ab"]) is None and cache.find(["a"]) is rows[0]
    assert (cache.hits, cache.misses) == (3, 1)
    cache.put_tokens("a", (1, 2))
    assert cache.tokens("a") == (1, 2) and cache.tokens("b") == ()
    empty = SessionCache(0)
    empty.put("a", rows[0])
    assert len(empty) == 0


def test_images_are_known_by_their_pixels():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (2, 3, 3), np.uint8)
    assert image_store.digest(pixels) == image_store.digest(pixels.copy())
    assert image_store.digest(pixels) != image_store.digest(pixels.reshape(3, 2, 3))
    store, images = ImageStore(2), [object() for _ in range(3)]
    for i, image in enumerate(images):
        store.put(str(i), image)
        store.get("0")
    assert store.get("0") is images[0] and store.get("1") is None and len(store) == 2


def test_only_data_urls_are_read():
    assert content.data_of_url("data:image/png;base64,AAAA", "x") == b"\0\0\0"
    for url in ("http://a/b.png", "file:///a", "data:text/html;base64,AA==", "//a", "", "DATA:"):
        with pytest.raises(RequestError, match=r"x: expected a URL of the form data:image/png"):
            content.data_of_url(url, "x")
