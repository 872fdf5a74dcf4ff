"""The defaults of the commands `compress` and `decompress` of both packages."""

from pathlib import Path

from bytelm.compression.codec import SUFFIX
from bytelm.config import DataConfig, ModelConfig, require


def default_out(path: Path, out: Path, is_compressed: bool = False) -> Path:
    """`out`, or for the empty path the usual name, which for a restored file must be free."""
    if out != Path():
        return out
    if not is_compressed:
        return path.with_name(path.name + SUFFIX)
    named = path.suffix == SUFFIX
    require(named, f"FILE={path}: does not end in {SUFFIX}; name the file to write with --out")
    restored = path.with_suffix("")
    require(not restored.exists(), f"{restored}: exists; name the file to write with --out")
    return restored


def default_window(config: ModelConfig, trained: int) -> int:
    """The training length, or if it is not known (0) that of a new recipe, as far as it fits."""
    length = trained or DataConfig().sequence_length
    return min(length, config.longest_input or length)
