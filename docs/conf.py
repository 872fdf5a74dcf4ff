"""The site: `scripts/docs` builds it. Pages are Markdown; two of the reference are generated."""

import re
import sys
from pathlib import Path

from sphinx.errors import ConfigError

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]

import generate_reference  # noqa: E402
import notebooks  # noqa: E402

import bytelm  # noqa: E402

project = "bytelm"
author = "The bytelm authors"
copyright = "2026, the bytelm authors"
version = release = bytelm.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "executed", "Thumbs.db", ".DS_Store"]

# Tutorials show what `scripts/docs --execute` printed; a build executes nothing.
nb_execution_mode = "cache"
nb_execution_cache_path = str(DOCS / "_build" / "jupyter-cache")
nb_execution_raise_on_error = True
nb_merge_streams = True
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 4
nitpicky = False

# Docstrings are prose with names in single backticks, as in Markdown.
default_role = "literal"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 80
python_display_short_literal_types = True
toc_object_entries_show_parents = "hide"

html_theme = "sphinx_book_theme"
html_title = f"bytelm {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "home_page_in_toc": True,
    "navbar_persistent": [],
}

SEARCH = {
    "start": ["train on my text", "install", "TPU", "quick start", "demo", "wheel", "extras"],
    "tour": ["commands", "cheat sheet"],
    "tutorial-train": ["tutorial", "getting started", "plot"],
    "tutorial-convert": ["convert", "export", "import"],
    "tutorial-blt": ["patch length"],
    "tutorial-names": ["names", "lines", "reset"],
    "tutorial-fine-tune": ["forgetting"],
    "tutorial-pytorch": ["training loop"],
    "concepts": ["logits", "surprise", "patches", "tokenizer-free"],
    "training": ["resume", "NaN", "run folder", "diverged", "crash", "checkpoint", "epochs",
                 "TensorBoard", "Weights & Biases", "wandb", "sweep", "recipe file"],
    "data": ["jsonl", "gzip", "Parquet", "zstd", "WebDataset", "my own text", "data set", "mixture",
             "chat", "prompt", "s3", "gs", "validation set", "large corpus"],
    "fine-tuning": ["fine-tune", "fine-tuning", "LoRA", "adapter", "peft", "freeze", "branch",
                    "early stopping", "EMA", "init-from"],
    "optimizers": ["learning rate", "Q-learning", "schedule", "warmup", "muon", "lion"],
    "pods": ["multi-node", "SLURM", "Kubernetes", "FSDP", "sharding", "several GPUs", "dry run",
             "distributed", "cluster", "out of memory", "memory"],
    "gpu": ["GPU", "CUDA", "H200"],
    "generation": ["generate", "sampling", "temperature", "serve", "web page", "browser"],
    "serving": ["API", "server", "completions", "streaming", "batching", "Prometheus", "API key"],
    "evaluation": ["bits per byte", "perplexity", "eval"],
    "pytorch": ["Hugging Face", "transformers", "torch", "AutoModelForCausalLM", "torchrun"],
    "python": ["from_pretrained", "Python API", "library"],
    "models": ["recipes", "MEGABYTE", "Bytropix", "LFByteTransformer", "model sizes"],
    "blt": ["BLT", "Byte Latent Transformer", "entropy model", "calibrate", "threshold"],
    "parity": ["equivalence", "tolerance", "same model"],
    "formats": ["exit code", "metrics.jsonl", "safetensors", "config.json", "file format"],
    "measured": ["speed", "benchmark", "throughput", "H100"],
    "faq": ["OpenAI API", "error", "error message", "troubleshooting"],
    "extending": ["add an architecture", "add an optimizer", "new model", "contribute"],
    "limitations": ["limitations", "known issues"],
}  # fmt: skip
"""Page → what people type into the search box to find it; main entries of the index."""


def add_index_entries(app, name: str, source: list[str]) -> None:
    """Puts the entries of `SEARCH` below the title of a page."""
    if name in SEARCH:
        top, title, rest = re.split(r"^(# .*)$", source[0], maxsplit=1, flags=re.MULTILINE)
        entries = "".join(f"```{{index}} ! single: {entry}\n```\n\n" for entry in SEARCH[name])
        source[0] = f"{top}{title}\n\n{entries}{rest}"


def take_outputs(app, config) -> None:
    """Gives the tutorials what they printed; ends the build where their cells were changed."""
    try:
        notebooks.fill_cache(Path(config.nb_execution_cache_path))
    except ValueError as error:
        raise ConfigError(str(error)) from None


def setup(app):
    """Writes the generated pages before Sphinx looks for sources."""
    app.connect("config-inited", lambda app, config: generate_reference.write(DOCS / "reference"))
    app.connect("config-inited", take_outputs)
    app.connect("source-read", add_index_entries)
    app.connect("autodoc-process-docstring", generate_reference.as_restructured_text)
