"""Print the requirements of the package with some extras, one a line, for the Dockerfile.

python launch/requirements.py [EXTRA,EXTRA...]
"""

import re
import sys
import tomllib
from pathlib import Path


def requirements(extras: list[str]) -> list[str]:
    """Return the dependencies and those of the extras, without those on the package itself.

    Raises:
        ValueError: If pyproject.toml has no such extra.
    """
    file = Path(__file__).parents[1] / "pyproject.toml"
    project = tomllib.loads(file.read_text("utf-8"))["project"]
    groups, lines = project["optional-dependencies"], list(project["dependencies"])
    for extra in extras:
        if extra not in groups:
            raise ValueError(f"there is no extra {extra!r}; expected some of {', '.join(groups)}")
        for line in groups[extra]:
            inner = re.fullmatch(rf"{project['name']}\[(.*)\]", line)
            lines += requirements(inner[1].split(",")) if inner else [line]
    return list(dict.fromkeys(lines))


if __name__ == "__main__":
    names = [name for arg in sys.argv[1:] for name in arg.replace(" ", "").split(",") if name]
    try:
        print("\n".join(requirements(names)))
    except ValueError as error:
        sys.exit(f"error: {error}")
