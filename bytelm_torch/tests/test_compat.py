"""The examples of three earlier projects run, in a process that cannot import JAX.

With BYTELM_EXAMPLES set to a folder with the projects' READMEs (not all of which may be copied
here) their Python blocks are run; changed are import lines, and `cuda` to `cpu`. Without it, the
same calls on smaller models, which cost a tenth of the time.
"""

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bytelm.config.q_learning import QLearningConfig
from bytelm_torch.compat.bytropix import EnhancedSGD
from bytelm_torch.q_learning import q_learning_metrics

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
    BYTROPIX
    + """
network = torch.nn.Linear(4, 2)
optimizer = EnhancedSGD(
    network.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01, smoothing_factor=0.05,
    entropy_threshold=0.3, max_grad_norm=1.0, noise_scale=1e-4, lr_scale_bounds=(0.5, 2.0),
    momentum_scale_bounds=(0.8, 1.2),
)
scaler = torch.amp.GradScaler("cpu")
losses = []
for _ in range(30):
    optimizer.zero_grad(set_to_none=True)
    loss = network(torch.eye(4)).square().mean()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    losses.append(loss.detach())
assert losses[-1] < losses[0] / 2
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
lm_logits, none = megabyte(input_ids)  # the original's order
assert none is None and lm_logits.shape == megabyte(input_ids).lm_logits.shape == (2, 64, 512)
assert config == MegabyteConfig(512, 4, 8, 16, 64, 2, 1, 2, 1, 0.02, 257, 258)
lm_head_megabyte = MegabyteLMHeadModel.from_native_megabyte(megabyte)
tokenizer = MegabyteTokenizer(eos_token_id=lm_head_megabyte.config.eos_token_id)
inputs = tokenizer("Today is", return_tensors="pt")
outputs = lm_head_megabyte.generate(
    **inputs, max_new_tokens=5, return_dict_in_generate=True, output_scores=True
)
texts = tokenizer.decode(outputs.sequences)
""",
]

# Runs every part in the names of the one before; importing JAX raises. Seeded, since an untrained
# model draws the end of the text as its first byte once in some 260 times.
RUNNER = """
import json, sys, warnings
sys.modules.update(jax=None, flax=None, bytelm_jax=None)
warnings.filterwarnings("ignore", "patch_size|distributed=True")
import torch
torch.manual_seed(0)
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


@pytest.mark.slow
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


# ---- the optimizer of bytropix --------------------------------------------------------------


EAGER = QLearningConfig(interval=1, epsilon=1.0, epsilon_floor=1.0, undo_margin=0.0)
"""An agent that changes rate and momentum at every step."""


def train(optimizer, weight, losses):
    seen = []
    for loss in losses:
        weight.grad = torch.full_like(weight, 0.5)
        optimizer.step(loss=loss)
        metrics = q_learning_metrics(optimizer)
        seen.append([float(metrics[name]) for name in ("learning_rate_scale", "momentum")])
    return torch.tensor(seen).T


@pytest.mark.parametrize(
    ("bounds", "ranges"),
    [
        ({}, ((0.1, 10.0), (0.5, 0.995))),
        ({"lr_scale_bounds": (0.9, 1.1)}, ((0.9, 1.1), (0.5, 0.995))),
        ({"momentum_scale_bounds": [0.98, 1.02]}, ((0.1, 10.0), (0.882, 0.918))),
        ({"momentum_scale_bounds": (0.2, 2.0)}, ((0.1, 10.0), (0.18, 0.995))),
        (
            {"lr_scale_bounds": (1.0, 1.0), "momentum_scale_bounds": (1.0, 1.0)},
            ((1, 1), (0.9, 0.9)),
        ),
    ],
)
def test_bounds_clamp_what_the_agent_makes_of_rate_and_momentum(bounds, ranges):
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = EnhancedSGD([weight], lr=1e-3, controller=EAGER, **bounds)
    seen = train(optimizer, weight, torch.rand(150, generator=torch.manual_seed(0)) + 1.0)
    free = train(EnhancedSGD([weight], controller=EAGER), weight, [1.0] * 3)
    assert len(free.unique()) > 2
    for values, (low, high) in zip(seen, ranges, strict=True):
        assert low - 1e-6 <= values.min() and values.max() <= high + 1e-6
        tight = high / low < 1.3
        assert not tight or (values.min() < low + 1e-6 and values.max() > high - 1e-6)


def test_the_smoothing_factor_is_the_weight_of_a_new_loss():
    weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = EnhancedSGD([weight], smoothing_factor=0.25, controller=EAGER)
    train(optimizer, weight, [4.0, 2.0, 1.0])
    smoothed = q_learning_metrics(optimizer)["smoothed_loss"]
    assert float(smoothed) == pytest.approx(0.75 * (0.75 * 4.0 + 0.25 * 2.0) + 0.25 * 1.0)
    default = EnhancedSGD([weight], controller=EAGER)
    same = EnhancedSGD([weight], smoothing_factor=1 - 0.5 ** (1 / EAGER.window), controller=EAGER)
    for each in (default, same):
        train(each, weight, [4.0, 2.0, 1.0])
    assert float(default.agent.smoothed) == pytest.approx(float(same.agent.smoothed))


@pytest.mark.parametrize("restored", ["state_dict", "pickle"])
def test_steps_without_a_loss_are_sgd_with_momentum_and_leave_the_agent_alone(restored):
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(3, 2)) for _ in range(2))
    arguments = {"lr": 0.1, "weight_decay": 0.0, "max_grad_norm": 0.0, "centralize": False}
    optimizer = EnhancedSGD([ours], **arguments)
    plain = torch.optim.SGD([theirs], lr=0.1, momentum=0.9)
    agent = str(optimizer.agent._replace(learning_rate=torch.zeros(())))
    for _ in range(5):
        gradient = torch.randn(3, 2)
        ours.grad, theirs.grad = gradient, gradient.clone()
        assert optimizer.step() is None
        plain.step()
    torch.testing.assert_close(ours, theirs)
    assert str(optimizer.agent._replace(learning_rate=torch.zeros(()))) == agent
    assert float(q_learning_metrics(optimizer)["learning_rate"]) == pytest.approx(0.1)
    before = ours.detach().clone()
    ours.grad = torch.full_like(ours, torch.nan)
    optimizer.step()
    assert torch.equal(ours, before)

    noisy = EnhancedSGD([ours], noise_scale=1.0, **arguments)
    moves = []
    for step in range(3):
        if step == 2 and restored == "state_dict":
            state = noisy.state_dict()
            noisy = EnhancedSGD([ours], **arguments)
            noisy.load_state_dict(state)
        elif step == 2:
            noisy = pickle.loads(pickle.dumps(noisy))
            ours = noisy.param_groups[0]["params"][0]
        ours.grad, before = torch.ones(3, 2), ours.detach().clone()
        noisy.step()
        average = noisy.state[ours]["momentum_buffer"].clone()
        moves.append(average)
    noise = [moves[0] / 0.1 - 1, (moves[1] - 0.9 * moves[0]) / 0.1 - 1]
    noise.append((moves[2] - 0.9 * moves[1]) / 0.1 - 1)
    for one, other in ((0, 1), (1, 2), (0, 2)):  # the noise of each step is its own
        assert not torch.allclose(
            noise[one] * (1 + one) ** 0.55, noise[other] * (1 + other) ** 0.55
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr_scale_bounds": (1.1, 2.0)}, "lr_scale_bounds=(1.1, 2.0): give (low, high), low"),
        ({"lr_scale_bounds": (0.0, 2.0)}, "lr_scale_bounds=(0.0, 2.0): give (low, high), low"),
        ({"momentum_scale_bounds": (0.5,)}, "momentum_scale_bounds=(0.5,): give (low, high)"),
        ({"smoothing_factor": 1.0}, "smoothing_factor=1.0: must be above 0 and below 1"),
    ],
)
def test_bad_bounds_are_named(arguments, message):
    with pytest.raises(ValueError) as error:
        EnhancedSGD([torch.nn.Parameter(torch.zeros(3))], **arguments)
    assert str(error.value).startswith(message)
