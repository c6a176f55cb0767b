"""The entry point `lmms_eval.models`: names the models that lmms-eval can load from this package.

lmms-eval imports every plugin in one block and only warns if one fails, so this module imports
nothing before it is called.
"""

from typing import Any

MODEL_ID = "starflow2_jax"
_CLASSES = "starflow2_jax.evaluation.harnesses.lmms_models"


def manifest() -> Any:
    """Return the manifest of the simple and the chat class."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id=MODEL_ID,
        simple_class_path=f"{_CLASSES}.SimpleSTARFlow2",
        chat_class_path=f"{_CLASSES}.ChatSTARFlow2",
        aliases=("starflow2",),
    )
