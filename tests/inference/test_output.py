"""Output folders of `generate`: a job that was killed goes on, and other files stay."""

import json

import numpy as np
import pytest
from etils import epath

from starflow2_jax.inference import output
from starflow2_jax.inference.prompts import Part

pytestmark = pytest.mark.fast


def test_a_job_goes_on_and_says_that_it_is_complete(tmp_path):
    out, job = epath.Path(tmp_path / "out"), {"options": {"seed": 0, "prompt": ("a",)}}
    assert output.start_job(out, job, overwrite=False) is None
    (out / "00000_00_0.png").write_bytes(b"half")
    (out / ".00001.png.partial").write_bytes(b"half")
    assert output.start_job(out, job, overwrite=False) is None
    assert not (out / ".00001.png.partial").exists()
    with pytest.raises(ValueError, match="is not empty; --overwrite"):
        output.start_job(out, {"options": {"seed": 1}}, overwrite=False)
    output.end_job(out, job, {"written": 1})
    assert output.start_job(out, job, overwrite=False) == {"written": 1}
    assert output.start_job(out, job, overwrite=True) is None
    (out / output.JOB_FILE).write_text("{")
    with pytest.raises(ValueError, match="is not empty"):
        output.start_job(out, job, overwrite=False)


def test_genevals_tree_goes_on_where_it_was(tmp_path):
    out, metadata = epath.Path(tmp_path), [{"prompt": text} for text in "abc"]

    def samples(numbers):
        for number in numbers:
            pixels = np.full((4, 4, 3), number, np.uint8)
            yield [[Part("image", image=pixels)] for _ in range(2)]

    numbers = output.missing_geneval(out, 3, 2)
    assert numbers == [0, 1, 2]
    assert output.save_geneval(out, metadata, samples(numbers[:2]), {}, numbers) == 4
    (out / "00000" / "samples" / "00001.png").unlink()
    numbers = output.missing_geneval(out, 3, 2)
    assert numbers == [0, 2]
    assert output.save_geneval(out, metadata, samples(numbers), {}, numbers) == 4
    assert output.missing_geneval(out, 3, 2) == []
    for number, row in enumerate(metadata):
        assert json.loads((out / f"{number:05}" / "metadata.jsonl").read_text()) == row
    assert output.is_of_this_package(out / "00002" / "samples" / "00001.png")
    assert not output.is_of_this_package(out / "settings.json")
