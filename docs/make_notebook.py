"""Write docs/tour.ipynb from docs/tour.md: `python docs/make_notebook.py` (needs the extra `docs`).

The page is what is edited, reviewed and tested; the notebook is what Jupyter, Colab and GitHub
open. It is stored without outputs, since those change with the weights.
"""

from pathlib import Path

import jupytext
import nbformat

FOLDER = Path(__file__).parent


def notebook() -> nbformat.NotebookNode:
    """Return the notebook of docs/tour.md, the same for the same text."""
    cells = jupytext.read(FOLDER / "tour.md")
    for number, cell in enumerate(cells["cells"]):
        cell["id"] = f"cell-{number:02}"
    # The format of the text says nothing in a notebook.
    cells["metadata"].pop("jupytext", None)
    return cells


if __name__ == "__main__":
    nbformat.write(notebook(), FOLDER / "tour.ipynb")
