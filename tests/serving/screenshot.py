"""Write a picture of the chat page after a drawn and an edited image.

python tests/serving/screenshot.py --model runs/stage3 --out docs/images/page.png \
    --prompt "a red circle above a blue square" --edit "make the circle green" --seed 1

It serves the model on a free port of this machine, and needs the extras `serve` and `browser` and
Debian's Chromium.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the helpers of the tests

from helpers import chat_page, live_server

from starflow2_jax.inference.load import load
from starflow2_jax.serving.settings import Settings


def main() -> None:
    """Parse the arguments, and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="pretrained/starflow2_tiny")
    parser.add_argument("--name", default="starflow2")
    parser.add_argument("--out", default="page.png")
    parser.add_argument("--prompt", default="a red circle above a blue square")
    parser.add_argument("--edit", default="make the circle green")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--width", type=int, default=760)
    parser.add_argument("--height", type=int, default=1080)
    args = parser.parse_args()
    if chat_page.CHROMIUM is None:
        parser.error(chat_page.MISSING)
    model = load(args.model)
    with (
        live_server.serve(model, Settings(max_batch=2), name=args.name) as (port, _),
        chat_page.open_page(port, args.width, args.height, device_scale_factor=2) as page,
    ):
        chat_page.take_screenshot(page, args.out, args.prompt, args.edit, args.seed)
    print(f"written {args.out}")


if __name__ == "__main__":
    main()
