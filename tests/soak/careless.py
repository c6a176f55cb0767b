"""A command that a soak test has to find fault with: `careless INPUT OUTPUT`.

It writes in place, takes its input as it is, and refuses what an interrupted run of it has left.
"""

import json
import os
import sys


def main() -> None:
    """Copy the numbers of a JSON file."""
    source, target = sys.argv[1:]
    with open(source) as file:
        values = json.load(file)
    if os.path.exists(target):
        sys.exit(f"error: {target} exists")
    with open(target, "w", buffering=1) as file:
        for name, value in values.items():
            file.write(f"{name} {value}\n")


if __name__ == "__main__":
    main()
