"""Qwen2.5-VL of transformers on torch: small random models, and what they make of inputs.

`python tests/peer/torch_qwen.py` writes tests/golden/qwen_tiny.npz, so that parity is checked where
torch is not installed.
"""

from pathlib import Path

import numpy as np

IMAGE, START, END, PAD = 90, 88, 89, 2
SIZES = ((1, 4, 6), (1, 10, 4), (1, 6, 14))
TEXT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
VISION = {
    "depth": 3,
    "hidden_size": 16,
    "intermediate_size": 22,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
    "window_size": 16,
    "fullatt_block_indexes": [1],
}


def make(seed=0, tied=False, text=None, vision=None, sections=(1, 1, 2)):
    """A random model in float32; every bias and norm weight is drawn too."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(sections)}
    config = Qwen2_5_VLConfig(
        text_config={**TEXT, **(text or {}), "rope_parameters": rope},
        vision_config={**VISION, **(vision or {})},
        image_token_id=IMAGE,
        video_token_id=91,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            weight.normal_(1.0 if "norm" in name or "ln_q" in name else 0.0, 0.3)
        else:
            weight.normal_(0.0, 1.2 * weight[0].numel() ** -0.5)
    return model


def inputs(rows, side, sizes=(), seed=0, values=96):
    """Return token rows padded on `side`, and random patches.

    Args:
        rows: lists of numbers of text tokens and of None, which is an image of the next of `sizes`.
    """
    rng, left, token_rows = np.random.default_rng(seed), list(sizes), []
    for row in rows:
        ids = []
        for part in row:
            if part is None:
                count = int(np.prod(left.pop(0))) // 4
                ids += [START, *[IMAGE] * count, END]
            else:
                ids += rng.integers(3, START, part).tolist()
        token_rows.append(ids)
    length = max(map(len, token_rows))
    ids, valid = np.full((len(rows), length), PAD), np.zeros((len(rows), length), bool)
    for i, row in enumerate(token_rows):
        columns = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        ids[i, columns], valid[i, columns] = row, True
    grids = np.array(sizes, np.int64).reshape(-1, 3)
    patches = rng.normal(size=(int(grids.prod(1).sum()), values)).astype(np.float32)
    return {"ids": ids.astype(np.int32), "valid": valid, "grids": grids, "patches": patches}


CASES = {
    "text": lambda: inputs([[20], [13]], "right"),
    "one": lambda: inputs([[3, None, 4]], "left", SIZES[:1]),
    "three_left": lambda: inputs([[3, None, 7], [1, None, 2, None, 3]], "left", SIZES),
    "three_right": lambda: inputs([[2, None, 1, None], [5, None, 2]], "right", SIZES[::-1]),
}


def arguments(case):
    """Return the inputs of a case as the arguments of the model."""
    import torch

    ids, valid = torch.tensor(case["ids"].astype(np.int64)), case["valid"].astype(np.int64)
    model_inputs = {
        "input_ids": ids,
        "attention_mask": torch.tensor(valid),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }
    if len(case["grids"]):
        model_inputs["pixel_values"] = torch.tensor(case["patches"])
        model_inputs["image_grid_thw"] = torch.tensor(case["grids"])
    return model_inputs


def positions(model, case):
    """Return positions [3, B, T], and the next position minus the length [B, 1]."""
    model_inputs = arguments(case)
    model_inputs.pop("pixel_values", None)
    return model.model.get_rope_index(**model_inputs)


def reference(model, case):
    """Return the outputs of the model for a case, as numpy arrays."""
    import torch

    position_ids = positions(model, case)[0]
    out = model(**arguments(case), position_ids=position_ids, output_hidden_states=True)
    outputs = {
        "positions": position_ids.numpy().transpose(1, 2, 0),
        "hidden": torch.stack(out.hidden_states).numpy(),
        "logits": out.logits.numpy(),
    }
    if len(case["grids"]):
        grids = torch.tensor(case["grids"])
        patches = torch.tensor(case["patches"])
        vision = model.model.visual(patches, grid_thw=grids, output_hidden_states=True)
        outputs["vision"] = torch.stack(vision.hidden_states).numpy()
        outputs["features"] = vision.pooler_output.numpy()
    return outputs


def greedy(model, case, count=64):
    """Return `count` greedily decoded tokens of every row."""
    out = model.generate(
        **arguments(case),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=PAD,
    )
    return out[:, case["ids"].shape[1] :].numpy()


def main():
    """Write the golden file."""
    import json

    import transformers

    model, arrays = make(), {}
    for name, weight in model.state_dict().items():
        arrays[f"weights/{name}"] = weight.numpy()
    for name in ("text", "one", "three_left"):
        case = CASES[name]()
        case_arrays = case | reference(model, case)
        arrays |= {f"{name}/{key}": value for key, value in case_arrays.items()}
        if name != "text":
            arrays[f"{name}/greedy"] = greedy(model, case).astype(np.int32)
    arrays["config"] = np.array(json.dumps(model.config.to_dict(), default=str))
    arrays["transformers"] = np.array(transformers.__version__)
    np.savez_compressed(Path(__file__).parents[1] / "golden" / "qwen_tiny.npz", **arrays)


if __name__ == "__main__":
    main()
