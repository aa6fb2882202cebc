"""Sphinx reads what stage.py laid out. Nothing in the finished book asks the network for anything."""
import shutil
from importlib.util import find_spec
from pathlib import Path

from plotly.offline import get_plotlyjs

project = "handrecon"
author = "the handrecon authors"
copyright = "2026, the handrecon authors"
language = "en"

extensions = ["myst_nb"]
exclude_patterns = ["generated"]                       # fragments that pages include
nb_execution_mode = "off"                              # notebooks keep the outputs they were committed with
nb_ipywidgets_js = {}                                  # widgets live in JupyterLab; their script would come from the network
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
# A lesson may begin a part with a third-level heading; a chapter may have no page yet; a constant that is cut short may not be whole Python.
suppress_warnings = ["myst.header", "toc.empty_glob", "misc.highlighting_failure"]

html_theme = "sphinx_book_theme"
html_title = "handrecon"
html_static_path = ["static"]
html_css_files = ["book.css"]
html_js_files = ["figures.js"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "show_toc_level": 2,
    "navbar_persistent": [],                           # the side bar has the search field already
    "use_download_button": False,
    "use_fullscreen_button": False,
}
html_context = {"default_mode": "auto"}
mathjax_path = "mathjax/tex-mml-chtml.js"


def vendor(app, problem):
    "MathJax and plotly.js, once for all pages, from the packages that carry them."
    if problem or app.builder.format != "html": return
    static = Path(app.outdir) / "_static"
    (package,) = find_spec("sphinx-mathjax-offline").submodule_search_locations
    for name in ("tex-mml-chtml.js", "output/chtml/fonts/woff-v2"):
        source, target = Path(package) / "static/mathjax" / name, static / "mathjax" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target, dirs_exist_ok=True) if source.is_dir() else shutil.copyfile(source, target)
    (static / "plotly.min.js").write_text(get_plotlyjs())


def setup(app):
    app.connect("build-finished", vendor)
