"""Serves an OpenAI-compatible API of a model.

python -m bytelm_torch.serve exports/megabyte_tiny
"""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from bytelm_torch.compress import Device, run_command

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code. Bad input: 2 and one line on standard error."""
    return run_command(_serve, "serve", argv)


def _serve(
    model: Path,
    /,
    host: str = "127.0.0.1",
    port: int = 7860,
    slots: int = 16,
    api_key: str = "",
    max_prompt_bytes: int = 4096,
    max_new_bytes: int = 1024,
    queue: int = 128,
    checkpoint: str = "latest",
    device: Device = "cpu",
) -> int:
    """Serves /v1/completions, /v1/models, /health and /metrics.

    Only this machine can reach it, unless --host says otherwise.

    Example: python -m bytelm_torch.serve exports/megabyte_tiny

    Args:
        model: an export, or a run folder of this package.
        host: the address to listen on; 0.0.0.0 is every network that this machine is in.
        port: the port to listen on.
        slots: how many texts are written at once; each takes memory for its caches.
        api_key: what clients must send; by default the variable BYTELM_API_KEY.
        max_prompt_bytes: the longest starting text.
        max_new_bytes: the longest continuation.
        queue: how many texts may wait; more are refused.
        checkpoint: of a run folder: latest, best or a step.
        device: where the model runs.
    """
    from bytelm.serving import command
    from bytelm_torch.inference.slots import TorchSlots, in_own_thread
    from bytelm_torch.interop.export import from_pretrained

    command.check_options(host, port, slots, max_prompt_bytes, max_new_bytes, queue)
    key = command.key_of(api_key)

    def make_engine() -> TorchSlots:
        loaded = from_pretrained(model, device=device, checkpoint=checkpoint)
        return TorchSlots(loaded, slots, max_prompt_bytes + max_new_bytes)

    with ExitStack() as stack:
        engine = in_own_thread(make_engine)
        name = model.resolve().name
        api = command.make_api(engine, name, max_prompt_bytes, max_new_bytes, queue, key)
        stack.callback(api.close)
        server = command.listen(api, host, port)
        stack.callback(server.close)
        stack.callback(api.close)  # first, so that no request is cut without an answer
        is_open = "" if key else "API; it has no key"
        command.announce(str(model), server.address, host, is_open)
        command.wait_for_interrupt()
    return 0


if __name__ == "__main__":
    sys.exit(main())
