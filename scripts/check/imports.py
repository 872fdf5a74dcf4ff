"""Prints how much memory `bytelm import` of a sharded Byte Latent Transformer takes, as JSON.

`python scripts/check/imports.py`: transformers writes one of 134 million parameters in shards, with
random weights; a fresh process imports it. `memory_mb` is that process's peak above what it holds
once its modules are imported and JAX has started.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import BltConfig, BltForCausalLM

LOCAL = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1024}
LOCAL |= {"hidden_size_global": 768}
IMPORT = """
import sys, jax
from bytelm_jax.cli.main import main
from bytelm_jax.interop import formats
from bytelm_jax.training import checkpoint
def held(kind):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))
jax.numpy.zeros(1).block_until_ready()
before = held("VmRSS")
assert main(["import", *sys.argv[1:]]) == 0
print(before, held("VmHWM"))
"""


def make(folder: Path) -> None:
    torch.manual_seed(0)
    config = BltConfig(
        encoder_hash_byte_group_vocab=20_002,
        encoder_config={**LOCAL, "num_hidden_layers": 1},
        decoder_config={**LOCAL, "num_hidden_layers": 4},
        global_config={"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 10}
        | {"intermediate_size": 2048},
        patcher_config={"hidden_size": 256, "num_attention_heads": 4, "num_hidden_layers": 2},
    )
    BltForCausalLM(config).save_pretrained(folder, max_shard_size="60MB")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, "hf"), Path(folder, "run")
        make(source)
        sizes = [file.stat().st_size for file in source.glob("*.safetensors")]
        command = [sys.executable, "-c", IMPORT, str(source), "--out", str(out)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    before, after = map(int, output.splitlines()[-1].split())
    row = {"model": sum(sizes), "largest_shard": max(sizes), "memory": after - before}
    print(json.dumps({f"{k}_mb": round(v / 1e6, 1) for k, v in row.items()} | {"n": len(sizes)}))


if __name__ == "__main__":
    main()
