"""`bytelm parity` for other programs: JSON, JUnit, HTML; and on hostile bytes."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import jax
import numpy as np
import pytest
import yaml

import bytelm_torch
from bytelm import tolerances
from bytelm.config import ByteVocab, MegabyteConfig
from bytelm_jax.cli import main as cli
from bytelm_jax.interop import convert
from bytelm_jax.models import define_model
from bytelm_jax.parity import output, report
from bytelm_jax.parity.hostile import hostile_rows
from bytelm_jax.tests.test_cli import refused

CONFIG = MegabyteConfig(
    variant="in_action", patch_size=4, global_dim=4, local_dim=8, global_layers=1, global_heads=2,
    local_layers=1, local_heads=2,
)  # fmt: skip
DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    convert.export_model(CONFIG, jax.jit(define_model(CONFIG)[1], static_argnums=0)(0), folder)
    return folder


def made() -> report.Report:
    """A report of a few rows, one of them past its tolerance, with names that need escaping."""
    made, one = report.Report(about={"model": "a<b"}), np.ones(3)
    made.compare("layers.0.attention", one, one, 1e-12, "layers.0.attention")
    made.compare("layers.0.feedforward", one, one + 1e-3, 1e-12, "layers.0.feedforward")
    made.compare("layers.0", one, one + 1e-3, 1e-12, "layers.0")
    made.compare("logits", one, one + 1e-9, 1e-12)
    made.compare("gradient of layers.0.feedforward.up.weight", one, one, 1e-12, "")
    made.add("greedy generation, 9 <bytes>", "same", True)
    return made


class Tags(HTMLParser):
    """What a browser would see: open tags, addresses, and the text that is marked as first."""

    def __init__(self):
        super().__init__()
        self.open, self.addresses, self.first, self.seen = [], [], "", []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.addresses += [values[name] for name in ("src", "href") if name in values]
        self.seen.append((tag, values))
        if tag != "meta" and tag != "br":
            self.open.append((tag, values.get("id")))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if any(name == "first" for _, name in self.open):
            self.first += data


def test_the_page_stands_alone_and_marks_the_first_divergence():
    page = output.to_html(made())
    tags = Tags()
    tags.feed(page)
    assert not tags.open and tags.addresses == ["#first"]  # nothing from elsewhere
    assert "layers.0.feedforward" in tags.first and "1.0e-03" in tags.first
    assert "a&lt;b" in page and "9 &lt;bytes&gt;" in page and "<bytes>" not in page
    opened = [values for tag, values in tags.seen if tag == "details" and "open" in values]
    assert len(opened) == 3  # layers, layers.0, layers.0.feedforward; attention is closed
    assert page.count("<details") == 5  # `up`, which has a gradient, as well
    good = report.Report()
    good.compare("logits", np.ones(2), np.ones(2), 1e-12)
    page = output.to_html(good)
    assert "equal: every tensor within tolerance" in page and "id=first" not in page


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_the_page_folds_long_lists_but_the_one_with_the_first_divergence(shift):
    made, one = report.Report(), np.ones(3)
    made.compare("gradient at to_logits", one, one, 1e-12, "to_logits")
    made.compare("decoding, round 1: to_logits (call 2)", one, one + shift, 1e-12, "to_logits")
    made.compare("decoding, round 1: logits", one, one + shift, 1e-12)
    page = output.to_html(made)
    folds = re.findall(r"<details( open)?><summary class=(\w+)>([A-Z]\w+)", page)
    state = (" open", "bad") if shift else ("", "good")
    assert folds == [("", "good", "Gradients"), (*state, "Cached")]
    assert "decoding, round 1: logits" in page.partition("<details")[0]


def test_json_and_junit_have_every_row():
    rows = json.loads(output.to_json(made()))
    assert (rows["passed"], rows["first"]) == (False, "layers.0.feedforward")
    assert [row["passed"] for row in rows["rows"]] == [True, False, False, False, True, True]
    assert rows["about"]["model"] == "a<b" and "jax" in rows["about"]["versions"]
    suite = ElementTree.fromstring(output.to_junit(made()).encode())
    cases = suite.findall("testcase")
    assert (suite.get("tests"), suite.get("failures"), len(cases)) == ("6", "3", 6)
    assert [case.find("failure") is not None for case in cases] == [
        not row["passed"] for row in rows["rows"]
    ]
    failure = cases[1].find("failure")
    assert failure is not None and failure.get("message") == (
        "1.0e-03: past tolerance; layer at fault: layers.0.feedforward"
    )


def test_hostile_bytes_are_what_they_are_called():
    vocab = ByteVocab(size=300, offset=3, pad_id=0, bos_id=1, eos_id=2)
    rows = {name: row - 3 for name, row in hostile_rows(vocab, 512).items()}
    assert list(rows) == [
        "zeros", "one byte repeated", "all values", "random bytes", "truncated UTF-8",
        "newlines only",
    ]  # fmt: skip
    assert not rows["zeros"].any() and set(rows["newlines only"].tolist()) == {10}
    assert len(set(rows["one byte repeated"].tolist())) == 1
    assert set(rows["all values"].tolist()) == set(range(256))
    assert len(set(rows["random bytes"].tolist())) > 200
    broken = bytes(rows["truncated UTF-8"].tolist())
    assert len(broken.decode("utf-8", "ignore")) == 0  # no character is whole


def test_a_fault_on_hostile_bytes_alone_is_found(export, tmp_path, capsys, monkeypatch):
    """Files are written and JSON is printed by the command."""
    original = bytelm_torch.from_pretrained

    def disturbed(path):
        twin = original(path)
        outputs = twin.outputs

        def changed(ids):
            result = outputs(ids)
            zeros = (ids == 0).all(dim=1)[:, None, None]
            return result._replace(logits=result.logits + 1e-6 * zeros)

        twin.outputs = changed
        return twin

    monkeypatch.setattr(bytelm_torch, "from_pretrained", disturbed)
    page, suite = tmp_path / "p.html", tmp_path / "p.xml"
    files = ["--json", "--html", str(page), "--junit", str(suite)]
    argv = ["parity", str(export), "--length", "9", "--bytes"]
    assert cli.main([*argv, "hostile", *files]) == 1
    result = json.loads(capsys.readouterr().out)
    wrong = [row["what"] for row in result["rows"] if not row["passed"]]
    alone = [what for what in wrong if what.startswith("logits on")]
    assert result["first"] == "logits" and alone == ["logits on zeros"]
    assert result["about"]["bytes"] == "hostile" and result["about"]["rows"] == 6
    assert "DIFFERENT from logits on" in page.read_text("utf-8")
    assert int(ElementTree.parse(suite).getroot().get("failures", 0)) == len(wrong)
    report_of_rows = report._rows_of(CONFIG, bytelm_corpus(), 2, 9, "real")
    assert report_of_rows[0].shape == (2, 9) and report_of_rows[2] == {}


def bytelm_corpus():
    from bytelm.data import memory_corpus

    return memory_corpus(b"some real bytes for two rows")


def test_files_that_cannot_be_written_are_refused_before_anything_runs(export, tmp_path, capsys):
    for option in "--html", "--junit":
        for file in tmp_path, tmp_path / "no" / "folder":
            assert f"{option} {file}" in refused(capsys, "parity", export, option, file)


def test_the_workflow_of_the_guide_is_one_and_its_options_exist(capsys):
    guide = (DOCS / "ci.md").read_text("utf-8")
    workflow = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", guide, re.DOTALL)[0])
    steps = workflow["jobs"]["parity"]["steps"]
    commands = [step["run"] for step in steps if "run" in step]
    commands += re.findall(r"^bytelm .*", guide, re.MULTILINE)
    with pytest.raises(SystemExit):
        cli.main(["parity", "--help"])
    helped = capsys.readouterr().out
    options = {word for line in commands for word in re.findall(r"--[a-z]+", line)}
    assert options == {"--bytes", "--junit", "--html", "--json"}
    assert all(option in helped for option in options)
    kinds = workflow["jobs"]["parity"]["strategy"]["matrix"]["bytes"]
    assert all(kind in helped for kind in kinds)
    exec(re.findall(r"```python\n(.*?)```", guide, re.DOTALL)[0], {})
    assert report.LOGITS is tolerances.LOGITS and report.GRADIENTS is tolerances.GRADIENTS
