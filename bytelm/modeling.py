"""The code of a model in one file that needs torch and transformers alone.

`modeling_code` makes it from the sources of `bytelm_torch` and of what that imports of `bytelm`;
`bytelm export --format hf` writes it beside the weights. The classes in it are those that
`bytelm_torch.hf` registers.
"""

from __future__ import annotations

from typing import get_type_hints

from bytelm.bundle import bundle
from bytelm.config import MODEL_CONFIGS, ModelConfig, require

MODELING_MODULE = "modeling_bytelm"
"""What transformers is told that the module is called."""

_HEADER = '''"""{stem} of bytelm, a byte-level language model, for transformers.

Made by `bytelm export --format hf` (bytelm {version}, MIT licence) from the library's sources.
Export again in place of changing this file.

    AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)
"""

'''

_CLASSES = '''
from {module} import {kind}
from bytelm_torch.interop.transformers import ByteLMConfig, ByteLMForCausalLM


class {stem}LMConfig(ByteLMConfig):
    """The configuration of `{stem}ForCausalLM`; the field `bytelm` holds all of it."""

    model_type = "bytelm_{architecture}"
    native = {kind}


class {stem}ForCausalLM(ByteLMForCausalLM):
    """`{stem}` behind the interface of transformers."""

    config_class = {stem}LMConfig
'''


def modeling_code(config: ModelConfig) -> str:
    """The text of modeling_bytelm.py for the architecture of `config`.

    It holds what this architecture needs and nothing of the others.
    """
    from bytelm import __version__

    kind = type(config)
    named = {"stem": _stem(config), "kind": kind.__name__, "architecture": kind.architecture}
    code = _CLASSES.format(module=kind.__module__, **named)
    parts = [each for each in get_type_hints(kind).values() if each in MODEL_CONFIGS]
    kinds = ", ".join(each.__name__ for each in (kind, *parts))
    # A file of a model holds no optimizer and no recipe, and one architecture with its parts.
    replaced = {
        "bytelm.config.models.MODEL_CONFIGS": f"MODEL_CONFIGS = ({kinds},)",
        "bytelm.config.optimizer.OPTIMIZER_CONFIGS": "OPTIMIZER_CONFIGS = {}",
        "bytelm.config.optimizer.OptimizerConfig": "class OptimizerConfig: pass",
        "bytelm.config.serialize._BEFORE": "_BEFORE = {}",
        "bytelm.config.serialize._ALWAYS_WRITTEN": "_ALWAYS_WRITTEN = {}",
        "bytelm.config.serialize._optimizer_from_dict": "_optimizer_from_dict = None",
    }
    others = frozenset(each.__name__ for each in MODEL_CONFIGS if each is not kind)
    return _HEADER.format(version=__version__, **named) + bundle(code, replaced, others)


def auto_map(config: ModelConfig) -> dict[str, str]:
    """The classes that transformers' Auto classes take from the module, for config.json."""
    stem = _stem(config)
    return {
        "AutoConfig": f"{MODELING_MODULE}.{stem}LMConfig",
        "AutoModelForCausalLM": f"{MODELING_MODULE}.{stem}ForCausalLM",
    }


def _stem(config: ModelConfig) -> str:
    require(config.causal, "causal=False: generation needs a causal model")
    return type(config).__name__.removesuffix("Config")
