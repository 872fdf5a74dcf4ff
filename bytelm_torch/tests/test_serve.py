"""The command that serves a model."""

import http.client
import json
import re

import pytest
import torch

from bytelm.config import MegabyteConfig
from bytelm.sampling import SamplerConfig
from bytelm_torch import build_model, save_pretrained, serve
from bytelm_torch.inference.generate import generate

MODEL = MegabyteConfig(
    patch_size=4, global_dim=8, local_dim=16, global_heads=2, local_heads=2, global_layers=1,
    local_layers=1, max_length=128,
)  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # libraries of the server warn of each other
def test_the_command(tmp_path, capsys, monkeypatch):
    pytest.importorskip("fastapi", reason="needs the extra api")
    torch.manual_seed(0)
    model = build_model(MODEL)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.eval()
    save_pretrained(model, tmp_path / "tiny")
    heard = []

    def visit():
        address = re.findall(r"at http://(\S+)/ until", capsys.readouterr().out)[0]
        connection = http.client.HTTPConnection(address, timeout=60)
        body = {"model": "tiny", "prompt": "ab", "max_tokens": 20, "seed": 3, "valid_utf8": False}
        connection.request("POST", "/v1/completions", json.dumps(body))
        heard.append(json.loads(connection.getresponse().read())["choices"][0]["text"])
        connection.close()

    monkeypatch.setattr("bytelm.serving.command.wait_for_interrupt", visit)
    options = ["--port", "0", "--slots", "2", "--max-prompt-bytes", "20", "--max-new-bytes", "20"]
    assert serve.main([str(tmp_path / "tiny"), *options]) == 0
    (wanted,) = generate(model, [b"ab"], 20, SamplerConfig(), seed=3)
    assert heard == [wanted.decode("utf-8", "replace")]
    for argv, says in (
        ([str(tmp_path / "none")], "none"),
        ([str(tmp_path / "tiny"), "--slots", "0"], "--slots 0: must be from 1 to 4096"),
    ):
        assert serve.main([*argv, "--port", "0"]) == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1
