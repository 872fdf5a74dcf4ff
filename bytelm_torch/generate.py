"""Generation, under its public name; the module can be called as `generate`."""

from bytelm.callable_module import make_callable
from bytelm_torch.inference.generate import (
    SamplerConfig,
    complete,
    generate,
    generate_uncached,
    stream,
)

__all__ = ["SamplerConfig", "complete", "generate", "generate_uncached", "stream"]

make_callable(__name__, generate)
