"""The examples of three earlier projects run, in a process that cannot import JAX.

With BYTELM_EXAMPLES set to a folder with the projects' READMEs (not all of which may be copied
here) their Python blocks are run; changed are import lines, and `cuda` to `cpu`. Without it, the
same calls on smaller models, which cost a tenth of the time.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = os.environ.get("BYTELM_EXAMPLES")

BYTROPIX = "from bytelm_torch.compat.bytropix import *\nimport torch\n"
LFBYTE = "from bytelm_torch.compat.lfbyte import *\nimport torch\n"
MEGABYTE = "from bytelm_torch.compat.megabyte import *\nimport torch\n"

SMALL = [
    BYTROPIX
    + """
model = EnhancedByteTransformer(
    hidden_size=16, num_layers=1, num_heads=2, dropout_rate=0.1, context_size=8
)
dataloader, sampler = prepare_dataloader(
    batch_size=32, context_size=8, num_workers=1, distributed=True
)
optimizer = EnhancedSGD(model.parameters(), lr=1e-3, entropy_threshold=0.3, patch_size=6)
sampler_config = SamplerConfig(
    low_entropy_threshold=0.3, medium_entropy_threshold=1.2, high_entropy_threshold=2.5
)
train_model(
    model=model, dataloader=dataloader, optimizer=optimizer, epochs=5, learning_rate=1e-3,
    device="cpu", config=sampler_config, distributed=True,
)
""",
    BYTROPIX
    + """
model = EnhancedByteTransformer(
    hidden_size=16, num_layers=1, num_heads=2, dropout_rate=0.1, context_size=8
)
model.load_state_dict(torch.load("checkpoint_epoch_5.pt")["model_state_dict"])
model.eval()
seed_text = "The quick"
generated_text = generate_text(
    model=model, seed_text=seed_text, length=20, config=SamplerConfig(), device="cpu",
    temperature=0.8,
)
""",
    LFBYTE
    + """
model = LFByteTransformer(embed_dim=16, num_layers=1, adapt_dim=8)
save_checkpoint("model.pth", model, torch.optim.SGD(model.parameters(), lr=0.1), 9)
model.load_state_dict(torch.load("model.pth")["model_state_dict"])
start_sequence = "Once upon a time"
generated_text = generate_text(model.eval(), start_sequence, max_length=100)
""",
    MEGABYTE
    + """
config = MegabyteConfig(
    V=512, P=4, D_G=8, D_L=16, T_MAX=64, initializer_range=0.02, g_nlayers=1, g_nheads=2,
    l_nlayers=1, l_nheads=2, pad_id=257, eos_id=258,
)
megabyte = Megabyte(config)
input_ids = torch.randint(0, 255, (2, 64))
loss = megabyte(input_ids, return_loss=True).loss
loss.backward()
assert len(input_ids) == 2 and 5 < loss < 8 and megabyte(input_ids).loss is None
lm_head_megabyte = MegabyteLMHeadModel.from_native_megabyte(megabyte)
tokenizer = MegabyteTokenizer(eos_token_id=lm_head_megabyte.config.eos_token_id)
inputs = tokenizer("Today is", return_tensors="pt")
outputs = lm_head_megabyte.generate(
    **inputs, max_new_tokens=5, return_dict_in_generate=True, output_scores=True
)
texts = tokenizer.decode(outputs.sequences)
""",
]

# Runs every part in the names of the one before; importing JAX raises.
RUNNER = """
import json, sys, warnings
sys.modules.update(jax=None, flax=None, bytelm_jax=None)
warnings.filterwarnings("ignore", "patch_size|distributed=True")
import torch
names = {}
for part in json.load(open("parts.json")):
    names |= dict.fromkeys(("generated_text", "texts", "seed_text", "start_sequence"))
    exec(part, names)
    if "generated_text" in part:
        start = names["seed_text"] or names["start_sequence"]
        assert names["generated_text"].startswith(start), part
        assert len(names["generated_text"]) > len(start)
    if "texts" in part:
        assert names["texts"][0].startswith("Today is"), names["texts"]
        assert len(names["outputs"].scores) == 5
print("ran")
"""

PRELUDE = (
    LFBYTE
    + """
import os
os.makedirs("checkpoints", exist_ok=True)
model = LFByteTransformer()
save_checkpoint(
    "checkpoints/model_epoch_9.pth", model, torch.optim.SGD(model.parameters(), lr=0.1), 9
)
"""
)


def snippets():
    """The examples with their import lines replaced."""
    parts = []
    heads = (BYTROPIX, LFBYTE, MEGABYTE)
    files = sorted(Path(EXAMPLES or "").glob("*.txt"))
    for file, head in zip(files, heads, strict=True):
        blocks = re.findall(r"```python\n(.*?)```", file.read_text("utf-8"), re.DOTALL)
        assert blocks, file
        if head is LFBYTE:
            parts.append(PRELUDE)
        for code in blocks:
            lines = [x for x in code.splitlines() if not re.match(r"(from \S+ )?import ", x)]
            parts.append(head + "\n".join(lines).replace("'cuda'", "'cpu'"))
    assert len(parts) == 3 + 1 + 2 + 2
    return parts


def test_the_examples_run_without_jax(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "text").write_bytes(b"The quick brown fox jumps over the lazy dog. " * 4)
    (tmp_path / "parts.json").write_text(json.dumps(snippets() if EXAMPLES else SMALL))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error::UserWarning", "-c", RUNNER]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0 and done.stdout.endswith("ran\n"), done.stderr[-3000:]
    assert (tmp_path / "checkpoint_epoch_5.pt").is_file()
