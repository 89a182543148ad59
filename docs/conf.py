"""Sphinx makes a site of the Markdown pages: `make docs`.

The source folder is the repository, so that links between docs/ and benchmarks/ are the same here and on GitHub.
"""

import gspn

project = "gspn"
project_copyright = "the gspn contributors"
version = release = gspn.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
root_doc = "docs/index"
include_patterns = ["docs/*.md", "benchmarks/README.md", "benchmarks/results/**.md", "CHANGELOG.md", "CONTRIBUTING.md"]
include_patterns += ["weights/README.md"]
suppress_warnings = ["toc.not_included"]  # the reports of results, to which pages link

autodoc_typehints = "none"  # signatures show them
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False

html_math_renderer = "mathml"
html_theme = "furo"
html_title = f"gspn {release}"
html_theme_options = {"top_of_page_buttons": []}
html_extra_path = ["site"]  # index.html, which leads to the first page


def setup(app):
    """Formulas as MathML, which browsers draw themselves: MathJax would be loaded from another server."""
    from docutils import nodes
    from docutils.utils.math.latex2mathml import tex2mathml

    def inline(self, node):
        self.body.append(tex2mathml(node.astext(), as_block=False))
        raise nodes.SkipNode

    def block(self, node):
        self.body.append(
            f'<div style="margin: 1em 0; overflow-x: auto">{tex2mathml(node.astext(), as_block=True)}</div>'
        )
        raise nodes.SkipNode

    app.add_html_math_renderer("mathml", (inline, None), (block, None))
