"""Output folders of `generate`: a job that was killed goes on, and other files stay."""

import numpy as np
import pytest
from etils import epath

from starflow2_jax.inference import output

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


def test_a_picture_of_this_package_is_known_by_its_metadata(tmp_path):
    output.save_png(tmp_path / "a.png", np.zeros((4, 4, 3), np.uint8), {"seed": 1})
    (tmp_path / "settings.json").write_text("{}")
    assert output.is_of_this_package(tmp_path / "a.png")
    assert not output.is_of_this_package(tmp_path / "settings.json")


def test_a_job_that_failed_before_its_first_image_leaves_room_for_another(tmp_path):
    out = epath.Path(tmp_path)
    assert output.start_job(out, {"options": {"resize": "refuse"}}, overwrite=False) is None
    assert output.start_job(out, {"options": {"resize": "pad"}}, overwrite=False) is None
    output.end_job(out, {"options": {"resize": "pad"}}, {"rows": []})
    with pytest.raises(ValueError, match="is not empty"):
        output.start_job(out, {"options": {"resize": "refuse"}}, overwrite=False)
