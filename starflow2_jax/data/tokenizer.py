"""Training of a byte-level BPE tokenizer with Qwen's special tokens, splitting and chat template.

Small models use it in place of a published checkpoint's tokenizer. Its folder has the same format,
so no other code needs to tell the two apart.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from starflow2_jax.data import records, untrusted
from starflow2_jax.data.manifest import DatasetError, sha256_file
from starflow2_jax.runtime import atomic, json_text

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# The name that model folders use as well.
DIGEST_FILE = "sha256.json"
# Contractions, words with the space before them, single digits, marks, line ends, spaces.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Equal to the published template, except that there is no default system turn.
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train(data: str | os.PathLike[str], size: int) -> str:
    """Train a tokenizer of `size` ids on the texts of a dataset, and return its tokenizer.json.

    Equal data give an equal tokenizer.
    """
    import tokenizers  # heavy

    minimum = 256 + len(SPECIAL_TOKENS)
    if size < minimum:
        raise DatasetError(
            f"--vocabulary {size}: expected at least {minimum}, the bytes and special tokens"
        )
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.normalizer = tokenizers.normalizers.NFC()
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(_SPLIT), "isolated")
    spaces = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, spaces])
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(_texts(records.read(data)), trainer)
    return bpe.to_str(pretty=True)


def write(
    text: str, folder: str | os.PathLike[str], *, patch: int, merge: int, frames: int
) -> None:
    """Write a folder with tokenizer, chat template, image processor, and the digests of the files.

    A folder with just these files is left as it is; any other one is an error.

    `text` is tokenizer.json. A patch of the vision tower has `patch` pixels a side and `frames`
    video frames; a square of `merge` x `merge` patches forms one feature.
    """
    folder = Path(folder)
    special = {
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "bos_token": None,
    }
    images = {
        # The name of the published processor, which transformers opens without torch too.
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": patch,
        "merge_size": merge,
        "temporal_patch_size": frames,
        "min_pixels": (patch * merge) ** 2,
        "max_pixels": 16384 * (patch * merge) ** 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    files = {
        "tokenizer.json": json_text.decode(text, "the tokenizer"),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": 32768,
            "chat_template": TEMPLATE,
            **special,
        },
        "preprocessor_config.json": images,
    }
    texts = {
        name: (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()
        for name, content in files.items()
    }
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in texts.items()}
    texts[DIGEST_FILE] = (json.dumps(digests, indent=2) + "\n").encode()
    if folder.exists():
        # The same tokenizer is complete, though its process may have been killed after that.
        stored = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
        # Folders of earlier versions have no digests.
        if {DIGEST_FILE: texts[DIGEST_FILE], **stored} != texts:
            raise FileExistsError(f"{folder} exists; choose another --out")
        return
    with atomic.folder(folder) as temporary:
        for name, data in texts.items():
            (temporary / name).write_bytes(data)


def check(folder: str | os.PathLike[str]) -> None:
    """Compare the files of a tokenizer's folder with its list of digests, if it has one.

    Weights in the folder are left to those who read them.

    Raises:
        DatasetError: A file is damaged or missing; names it.
    """
    file = Path(folder) / DIGEST_FILE
    if not file.exists():
        return
    for name, expected in untrusted.read_json(file, dict[str, str]).items():
        path = file.parent / name
        if Path(name).name != name or path.suffix == ".safetensors":
            continue
        if not path.exists():
            raise DatasetError(f"{path} is missing (by {DIGEST_FILE})")
        if (actual := sha256_file(path)) != expected:
            raise DatasetError(
                f"{folder} is damaged: {name} has sha256 {actual}, expected {expected} by "
                f"{DIGEST_FILE}: one of the two is damaged"
            )


def find_damage(folder: str | os.PathLike[str]) -> str:
    """Return which file of a folder that has no readable tokenizer is at fault, and why.

    It is empty if every file alone can be read.
    """
    import tokenizers  # heavy

    try:
        for path in sorted(Path(folder).glob("*.json")):
            content = untrusted.read_json(path)
            if path.name == "tokenizer_config.json" and not isinstance(content, dict):
                return f"{path}: expected a JSON object"
            if path.name == "tokenizer.json":
                try:
                    tokenizers.Tokenizer.from_file(str(path))
                except Exception as error:  # tokenizers raises no other class
                    return f"{path}: no tokenizer: {error}"
    except DatasetError as error:
        return str(error)
    return ""


def _texts(dataset: Iterable[records.Record]) -> Iterator[str]:
    """Yield the texts of a dataset, and the role that the chat layout writes before each turn."""
    for record in dataset:
        role = "none"
        for segment in record.segs:
            if segment.role not in (role, "none"):
                yield f"{segment.role}\n"
            role = segment.role
            if isinstance(segment, records.Text):
                yield segment.s
