"""Class numbers of data and of labels are the model's, or refused."""

import types

import pytest

from starflow2_jax import evaluate
from starflow2_jax.inference import flow_sampler

pytestmark = pytest.mark.fast
CLASSES = ("1", "10", "11", "12", "2")


def test_data_with_other_classes_are_refused():
    flow = types.SimpleNamespace(classes=CLASSES, model_config=types.SimpleNamespace(classes=5))
    evaluate._check_classes(flow, {"classes": list(CLASSES)})
    for classes, difference in (
        (CLASSES[1:], "their numbers differ: 1$"),
        (CLASSES[::-1], "their order"),
        (None, "the 0 classes"),
    ):
        with pytest.raises(ValueError, match=difference):
            evaluate._check_classes(flow, {"classes": classes})
    unconditional = types.SimpleNamespace(
        classes=CLASSES, model_config=types.SimpleNamespace(classes=0)
    )
    evaluate._check_classes(unconditional, {"classes": None})


def test_a_label_is_a_name_before_it_is_a_number():
    numbers = [flow_sampler.class_number(label, CLASSES) for label in ("2", "12", "0", "-1")]
    assert numbers == [4, 3, 0, -1]
    for label in ("cat", "\u0663", "\u00b2", ""):
        with pytest.raises(ValueError, match="--label: unknown class"):
            flow_sampler.class_number(label, CLASSES)
