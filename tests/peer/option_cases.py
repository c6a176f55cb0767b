"""Values for combinations of flow options that the published golden files leave out.

    python tests/peer/option_cases.py --out tests/golden/options_tiny.npz

The file lets the suite check these options without torch. `<case>/options` is a JSON object in the
published vocabulary; the other keys, `<case>/params/...` among them, are those of
`torch_flow.reference`, in float64 (weights in float32, which holds them exactly). Grids and text
lengths are chosen so that rope positions are exact also in float32.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `peer` where this runs as a script

from peer.torch_flow import reference

SHALLOW = dict(
    in_channels=4, img_size=4, patch_size=1, channels=12, num_blocks=2, layers_per_block=1,
    head_dim=6, use_softplus=1, use_final_norm=1, soft_clip=4, seq_order="L2R",
)  # fmt: skip
TEXT = dict(txt_size=4, txt_dim=6, cond_top_only=1)
ROPE = dict(rope=1, sos=1, head_dim=20, num_heads=1)

CASES: dict[str, tuple[dict, dict]] = {  # name -> (options, arguments of `reference`)
    "everything": (
        dict(
            in_channels=3, img_size=8, patch_size=2, channels=8, top_block_channels=12,
            num_blocks=3, layers_per_block="1 0 2", head_dim=24, num_heads=2, num_kv_heads=1,
            rope=1, sos=1, txt_size=4, txt_dim=6, cond_top_only=0, use_softplus=1, use_swiglu=1,
            use_bias=0, use_qk_norm=1, use_post_norm=1, use_final_norm=1, hf_style_rope=1,
            norm_type="rms_norm", soft_clip=4, seq_order="L2R",
        ),
        dict(text_length=2),
    ),
    "learned_positions_no_bias": (SHALLOW | TEXT | dict(sos=1, use_bias=0), {}),
    "learned_positions_shift": (SHALLOW | dict(seq_order="R2L"), {}),
    "shift_with_rope": (SHALLOW | TEXT | ROPE | dict(sos=0, num_heads=2, num_kv_heads=1), {}),
    "patch_2": (SHALLOW | ROPE | dict(in_channels=2, img_size=8, patch_size=2) | TEXT, {}),
    "wide_grid": (SHALLOW | TEXT | ROPE | dict(cond_top_only=0), dict(grid=(2, 8))),
    "no_text_r2l": (SHALLOW | ROPE | dict(head_dim=8, num_heads=2, seq_order="R2L"), {}),
    "exp_scale": (SHALLOW | TEXT | ROPE | dict(use_softplus=0, soft_clip=1.5), {}),
    "no_clip_no_final_norm": (SHALLOW | TEXT | ROPE | dict(soft_clip=0, use_final_norm=0), {}),
}  # fmt: skip


def compute(name: str) -> dict[str, np.ndarray]:
    """All arrays of one case, keyed without its name; `options` is a 0-d string."""
    options, arguments = CASES[name]
    arrays = reference(options, seed=list(CASES).index(name), **arguments)
    keep = {
        key: value.astype(np.float32) if key.startswith("params/") else value
        for key, value in arrays.items()
        if not key.endswith(("attn_mask", "params/var", "freqs_cos", "freqs_sin"))
    }
    return {"options": np.asarray(json.dumps(options))} | keep


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    if out.exists():
        parser.error(f"{out} exists; remove it first")
    arrays = {f"{name}/{key}": v for name in CASES for key, v in compute(name).items()}
    np.savez_compressed(out, **arrays)
    print(f"{out}: {len(CASES)} cases, {len(arrays)} arrays, {out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
