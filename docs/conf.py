"""Sphinx's settings: the Markdown pages of this folder as they are, and an API reference made of docstrings.

`make docs` builds the site into docs/_build/html, without a network; warnings are errors there.
"""

import pathlib
import re
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import pictures  # noqa: E402  docs/pictures.py
import reference  # noqa: E402  docs/reference.py

import lipjax  # noqa: E402

project = "lipjax"
author = "the lipjax authors"
copyright = "the lipjax authors, Apache-2.0"  # noqa: A001  Sphinx's name
version = release = lipjax.__version__

extensions = [
    *("myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"),
    *("sphinx_copybutton", "sphinx_design"),
]
exclude_patterns = ["_build"]
templates_path: list[str] = []
html_theme = "furo"
html_title = "lipjax"
html_static_path = ["_static"]
html_theme_options = {"source_directory": "docs/"}
html_show_sphinx = False

nb_execution_mode = "off"  # tests execute the pages; the notebook holds its output
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence", "attrs_block"]

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # fields are listed once
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True
copybutton_exclude = ".linenos, .gp, .go"


# Pages of the site that show a file from outside of docs/.
SHOWN = {
    "contributing": "CONTRIBUTING.md",
    "golden": "tests/golden/README.md",
    "changelog": "CHANGELOG.md",
    "security": "SECURITY.md",
}


def _files_elsewhere(app, docname, source):
    """Puts those files in the place of their pages, and links to the pages in the place of links to the files."""
    if docname in SHOWN:
        source[0] = (HERE.parent / SHOWN[docname]).read_text().replace("](docs/", "](")
    if docname == "index":
        source[0] = pictures.only_there(source[0])
    for page, path in SHOWN.items():
        source[0] = source[0].replace(f"](../{path})", f"]({page}.md)").replace(f"]({path})", f"]({page}.md)")


def _plain_text(app, what, name, obj, options, lines):
    lines[:] = reference.as_rst(lines)


def _short_types(app, what, name, obj, options, signature, result):
    """Float[Array, "n m"] instead of Float[jaxlib._jax.Array, "n m"]."""
    module = re.compile(r"\b(?:jaxlib\._jax|jax|numpy)\.(?=\w*[Aa]rray)")
    return module.sub("", signature or "") or None, module.sub("", result or "") or None


def _all_names_are_there(app, exception):
    """Fails the build if a public name has no entry in the API reference."""
    if exception is None and app.builder.name == "html":
        there = set(app.env.get_domain("py").objects)
        missing = [name for name in reference.public_names() if name not in there]
        if missing:
            raise ValueError(f"Not in the API reference: {', '.join(missing)}.")


def setup(app):
    reference.write_pages(HERE / "api")
    app.connect("source-read", _files_elsewhere)
    app.connect("autodoc-process-docstring", _plain_text, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", _short_types)
    app.connect("build-finished", _all_names_are_there)
