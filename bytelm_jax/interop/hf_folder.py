"""An export that transformers loads where this library is not installed.

    AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)

The folder has the weights, a configuration, the model's code in one file, a tokenizer that needs no
code, settings of generation and a model card. It is an export of this library as well.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bytelm.config import ModelConfig
from bytelm.export import CONFIG_FILE, config_text, describe, sum_of_json
from bytelm.files import replace_file
from bytelm.folders import check_replaceable, replace_folder
from bytelm.modeling import MODELING_MODULE, auto_map, modeling_code
from bytelm.shards import is_weights_file, weight_writers
from bytelm_jax.interop import convert
from bytelm_jax.interop.hf_tokenizer import special_ids, suppressed_ids, tokenizer_files
from bytelm_jax.models import Params

_GENERATION, _CARD, _CODE = "generation_config.json", "README.md", f"{MODELING_MODULE}.py"
_NAMES = (CONFIG_FILE, _GENERATION, _CARD, _CODE, "tokenizer.json", "tokenizer_config.json")


def _may_replace(name: str) -> bool:
    return name in _NAMES or is_weights_file(name)


def check_out(out: Path) -> None:
    """Raises `ValueError` unless `export_hf` may write `out`: before weights are read."""
    check_replaceable(out, _may_replace)


def export_hf(
    config: ModelConfig,
    params: Params,
    out: Path,
    card: Callable[[str], str],
    extra: dict[str, Any] | None = None,
    max_shard_bytes: int = 50 * 1000**3,
    check: Callable[[Path], str] | None = None,
) -> list[str]:
    """Writes the folder whole or not at all, in place of an export that it holds; its files' names.

    `card` gives the text of README.md for what `check` says of the written folder, or for nothing.
    If `check` raises, there is no folder. Raises `ValueError` for a model that cannot generate,
    when `params` are not those of `config` or not finite, and when `out` holds other files or
    cannot be written.
    """
    convert.check_params(config, params)
    texts = {_CODE: modeling_code(config).encode(), _CARD: card("").encode()}
    jsons = {CONFIG_FILE: _config(config, params, extra), _GENERATION: _generation(config)}
    longest = None if config.longest_input is None else config.longest_input - 1
    jsons |= tokenizer_files(config.vocab, longest=longest)
    texts |= {name: config_text(content) for name, content in jsons.items()}
    files = weight_writers(
        convert.in_torch_layout(params),
        convert.NUMPY.raw,
        sum_of_json(describe(config)),
        max_shard_bytes,
    )
    files |= {name: lambda sink, text=text: sink.write(text) for name, text in texts.items()}

    def finish(folder: Path) -> None:
        if check is not None:
            replace_file(folder / _CARD, card(check(folder)).encode())

    replace_folder(out, files, _may_replace, finish)
    return sorted(files)


def _config(config: ModelConfig, params: Params, extra: dict[str, Any] | None) -> dict[str, Any]:
    """What `bytelm_torch.hf` writes, and besides where the code is."""
    classes, vocab = auto_map(config), config.vocab
    longest = config.longest_input
    limit = {} if longest is None else {"max_position_embeddings": longest - 1}
    return {
        "architectures": [classes["AutoModelForCausalLM"].rpartition(".")[2]],
        "auto_map": classes,
        "model_type": f"bytelm_{config.architecture}",
        "dtype": next(iter(params.values())).dtype.name,
        "vocab_size": vocab.size,
        "num_hidden_layers": config.layer_count,
        "tie_word_embeddings": False,
        **special_ids(vocab),
        **limit,
        "bytelm": describe(config, extra),
    }


def _generation(config: ModelConfig) -> dict[str, Any]:
    return {"suppress_tokens": suppressed_ids(config.vocab), **special_ids(config.vocab)}
