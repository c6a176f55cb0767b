"""Sphinx configuration: MyST pages, and API pages from the docstrings of the public interface."""

import itertools
import pathlib
import sys

from sphinx.util.docutils import SphinxDirective

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from starflow2_jax import __version__, config

project = "starflow2_jax"
author = "The starflow2_jax contributors"
release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]

myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]
myst_heading_anchors = 3

# `x` in a docstring is code.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
python_maximum_signature_line_length = 88

html_theme = "furo"
html_show_copyright = False
html_title = f"starflow2_jax {release}"


class ConfigKeys(SphinxDirective):
    """A table of every configuration key for each group, from `config.KEYS`."""

    def run(self) -> list:
        lines: list[str] = []
        group_of = lambda name: name.rpartition(".")[0]
        for group, names in itertools.groupby(config.KEYS, group_of):
            lines += [f"**{group or 'Top level'}**", "", ".. list-table::", "   :widths: 30 20 50"]
            lines += ["   :width: 100%", ""]
            for name in names:
                key = config.KEYS[name]
                lines += [f"   * - ``{name}``", f"     - ``{key.default!r}``", f"     - {key.doc}"]
            lines += [""]
        return self.parse_text_to_nodes("\n".join(["```{eval-rst}", *lines, "```"]))


def setup(app) -> None:
    """Register the directive of docs/api/config.md."""
    app.add_directive("config-keys", ConfigKeys)
