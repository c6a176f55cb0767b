"""The report: one file without external resources, written from the files of a workdir."""

import base64
import html
import io
import json
import math
import re
import shlex

import numpy as np
import pytest
from PIL import Image

from starflow2_jax import config
from starflow2_jax.evaluation.report import plots, run_report
from starflow2_jax.training.logging import run_log

pytestmark = pytest.mark.fast


def settings():
    cfg = config.default()
    cfg.name = "a <run> & more"
    cfg.model = {"side": 4, "channels": 12, "width": 16, "layers": (1, 1), "head_dim": 8}
    cfg.image.update(pixels=8, patch=2)
    cfg.train.steps = 40
    return cfg


def write_run(workdir, steps=40):
    cfg = settings()
    run_log.save_config(workdir, cfg)
    records = run_log.open(workdir, cfg)
    for step in range(1, steps + 1):
        nats = 1 + 2 / step
        row = {"loss": nats - 0.9, "nats_per_dim": nats, "grad_norm": 3 / step, "lr": 1e-4}
        row |= {"log_det/0": 0.1 * step, "log_det/1": -0.1, "tokens_per_second": 4321.5}
        run_log.write_row(records, step, row)
        if step % 10 == 0:
            run_log.write_row(records, step, {"eval/nats_per_dim": nats + 0.1})
            images = np.full((4, 8, 8, 3), step, np.uint8)
            run_log.write_samples(records, step, images, ["red", "green", "blue", "white"])
    run_log.close(records)
    return workdir


def embedded(page):
    """Return the images inside a page, by their alternative text."""
    images = re.findall(r'<img alt="([^"]*)" src="data:image/png;base64,([^"]+)"', page)
    return {alt: Image.open(io.BytesIO(base64.b64decode(data))) for alt, data in images}


def test_report_contains_images_figures_command_and_configuration(tmp_path, monkeypatch):
    argv = ["/a/python", "-m", "train", "--workdir", "a b", "--config.name=<x> --y", "--json"]
    monkeypatch.setattr(run_log.sys, "orig_argv", argv)
    path = run_report.write(write_run(tmp_path))
    page = path.read_text()
    assert path == tmp_path / "report.html"
    images = embedded(page)
    assert set(images) == {
        *("samples, step 40", "step 10", "step 20", "step 30", "step 40"),
        *("nats per dimension", "loss, log-determinants, gradient norm, learning rate, speed"),
    }
    newest = np.asarray(images["samples, step 40"])
    assert (newest[20, 20] == 40).all()
    assert images["nats per dimension"].width > 1000
    # The page loads no other file, and the name is text, not markup.
    assert not re.search(r'(src|href)="(?!data:)', page) and "<script" not in page
    assert "<h1>a &lt;run&gt; &amp; more</h1>" in page and "a <run>" not in page
    assert "step 40 of 40, finished" in page
    assert f"<b>{1 + 2 / 40 + 0.1:.4f}</b><span>nats/dim, evaluation data</span>" in page
    # The command has one flag on each line, quoted so that a shell reads the same arguments.
    (command,) = re.findall(r"<pre>(python[^<]*)</pre>", page)
    assert len(command.splitlines()) == 4
    assert shlex.split(html.unescape(command).replace("\\\n", "")) == ["python", *argv[1:]]
    assert "image.patch" in page and "pixels along the side of a token" in page
    assert f"jax {run_log.environment()['versions']['jax']}" in page


def test_report_shows_likelihoods_and_their_baseline(tmp_path):
    write_run(tmp_path)
    result = {
        "model": {"path": "x", "step": 40, "sha256": "0" * 64},
        "data": {"path": "data/test"},
        "rows": 500,
        "nats_per_dim": 1.25,
        "nats_per_dim_95": [1.2, 1.3],
        "bits_per_dim": None,
        "bits_per_dim_95": None,
        "not_comparable": "not comparable: trained with gaussian noise",
        "baselines": {
            "gaussian_per_dimension": {
                "nats_per_dim": 2.5, "bits_per_dim": None, "fit": "data/train"
            }
        },
        "protocol": {"noise": {"kind": "gaussian", "sigma": 0.05}},
    }  # fmt: skip
    folder = tmp_path / "evaluation"
    folder.mkdir()
    (folder / "likelihood_00000040_test.json").write_text(json.dumps(result))
    page = run_report.write(tmp_path).read_text()
    assert "1.2500 (1.2000 to 1.3000)" in page and "step 40, data/test" in page
    assert "Bits/dim are not comparable: trained with gaussian noise." in page
    assert "<b>2.5000</b><span>nats/dim, Gaussian per dimension</span>" in page
    (folder / "likelihood_broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"likelihood_broken.json: not JSON"):
        run_report.write(tmp_path)
    assert (tmp_path / "report.html").read_text() == page


def test_report_of_a_run_without_steps(tmp_path):
    run_log.save_config(tmp_path, settings())
    page = run_report.write(tmp_path).read_text()
    assert "step 0 of 40" in page and "finished" not in page and embedded(page) == {}
    run_log.close(run_log.open(tmp_path, settings()))
    assert "Commands and machine" in run_report.write(tmp_path).read_text()


def test_a_folder_of_no_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config.json: it is not the folder of a r"):
        run_report.write(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_wide_grids_are_scaled_down(tmp_path):
    write_run(tmp_path, steps=10)
    Image.new("RGB", (3000, 300), "red").save(tmp_path / "samples" / "00000020.png")
    images = embedded(run_report.write(tmp_path).read_text())
    assert images["samples, step 20"].size == (1200, 120)
    assert images["step 20"].size == (480, 48)


def test_grids_of_each_name_have_a_heading(tmp_path):
    log = run_log.open(write_run(tmp_path, steps=10), settings())
    images = np.full((2, 8, 8, 3), 7, np.uint8)
    captions = ["what is it? > a circle", ">"]
    for name in ("answers", "edits"):
        run_log.write_samples(log, 10, images, captions, name=name, columns=2)
    run_log.close(log)
    page = run_report.write(tmp_path).read_text()
    assert {"samples, step 10", "answers, step 10", "edits, step 10"} <= set(embedded(page))
    positions = [page.index(f"<h2>{name}</h2>") for name in ("Samples", "Answers", "Edits")]
    assert positions == sorted(positions)


def test_curves_leave_out_values_that_are_not_finite():
    rows = [{"step": s, "nats_per_dim": None if s == 3 else float(s)} for s in range(1, 6)]
    steps, values = plots.series(rows, "nats_per_dim")
    assert steps.tolist() == values.tolist() == [1, 2, 4, 5]
    assert plots.likelihood(rows, gaussian=9.0).startswith(b"\x89PNG")
    assert (
        plots.likelihood([{"step": 1}], None) is None
        and plots.training_curves([{"step": 1}]) is None
    )
    smooth = plots.smooth(np.full(200, 7.0))
    assert np.allclose(smooth, 7) and math.isclose(plots.smooth(np.array([3.0]))[0], 3)
