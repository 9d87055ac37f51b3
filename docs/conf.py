"""Sphinx configuration of the site. Its pages are the notebooks of nbs/, as docs/build.py prepares them in _proc/."""
from configparser import ConfigParser
from pathlib import Path

_parser = ConfigParser(delimiters=["="], interpolation=None)
_parser.read(Path(__file__).parents[1] / "settings.ini", encoding="utf-8")
_cfg = _parser["DEFAULT"]

project = _cfg["title"]
author = _cfg["author"]
copyright = _cfg["copyright"]
version = release = _cfg["version"]

extensions = ["myst_nb"]
exclude_patterns = ["**/.ipynb_checkpoints"]
nb_execution_mode = "off"  # the notebooks carry their outputs
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath", "attrs_block", "deflist"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type"]

html_theme = "furo"
html_title = _cfg["title"]
html_show_sphinx = False
