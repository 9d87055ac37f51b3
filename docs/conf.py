"""Sphinx configuration of the site. Its pages are the notebooks of nbs/, as docs/build.py prepares them in docs/_build/pages."""
from configparser import ConfigParser
from importlib.metadata import distribution
from pathlib import Path

_parser = ConfigParser(delimiters=["="], interpolation=None)
_parser.read(Path(__file__).parents[1] / "settings.ini", encoding="utf-8")
_cfg = _parser["DEFAULT"]

project = _cfg["title"]
author = _cfg["author"]
copyright = _cfg["copyright"]
version = release = _cfg["version"]

extensions = ["myst_nb", "sphinxcontrib.bibtex"]
exclude_patterns = ["**/.ipynb_checkpoints"]
nitpicky = True
nb_execution_mode = "off"  # the notebooks carry their outputs
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath", "attrs_block", "attrs_inline", "colon_fence", "deflist"]
myst_heading_anchors = 3
bibtex_bibfiles = ["references.bib"]
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type"]

# One file of MathJax, which draws formulas as SVG and so needs no fonts; nothing comes from the network.
_mathjax = Path(distribution("sphinx-mathjax-offline").locate_file("sphinx-mathjax-offline/static/mathjax/tex-svg-full.js"))
mathjax_path = _mathjax.name
mathjax3_config = {"options": {"enableMenu": False}}

html_theme = "furo"
html_title = _cfg["title"]
html_show_sphinx = False
html_copy_source = False
html_show_search_summary = False  # it fetches the pages found, which a browser refuses without a server
html_static_path = ["static", str(_mathjax)]
html_extra_path = [str(Path(__file__).parent / "_build/extra")]
html_css_files = ["site.css"]
html_js_files = ["site.js"]


def _language(app, pagename, templatename, context, doctree):
    """Pages in Chinese say so."""
    if pagename.startswith("zh/") or pagename.endswith("_zh"):
        context["language"] = "zh"


def setup(app):
    """Called by Sphinx."""
    app.connect("html-page-context", _language)
