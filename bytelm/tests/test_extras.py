"""What is said of a package that is not there."""

import pytest

from bytelm.extras import import_extra


def test_a_missing_package_is_told_from_one_that_misses_another(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for name, content in {
        "whole": "",
        "lacking": "import nowhere.at_all",
        "broken": "import x",
    }.items():
        (tmp_path / f"{name}_extra.py").write_text(content)
    (tmp_path / "x.py").write_text("raise ImportError('built for another machine')")
    assert import_extra("whole_extra", "api").__name__ == "whole_extra"
    for name, said in {
        "absent_extra.part": "is not installed",
        "lacking_extra": "cannot be imported without nowhere, which is not installed",
        "broken_extra": "cannot be imported (built for another machine)",
    }.items():
        with pytest.raises(ValueError) as error:
            import_extra(name, "api")
        package = name.partition(".")[0]
        assert str(error.value) == f"{package}: {said}; pip install 'bytelm[api]'"
