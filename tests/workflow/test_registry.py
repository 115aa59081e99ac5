"""The catalogue of passes: built-in ones, plugins, name conflicts and errors."""

import importlib
import sys

import pytest
from packages import install

from kvsurgeon.errors import PluginError, UsageError
from kvsurgeon.passes.options import options_of, summary
from kvsurgeon.workflow.registry import BUILT_IN, PASSES, summary_of


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0].endswith("_passes")]:
        del sys.modules[name]
    importlib.invalidate_caches()


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_pass_has_its_name(name):
    assert PASSES.find(name).load().name == name


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_summary_is_the_first_docstring_line(name):
    entry = PASSES.find(name)
    assert summary_of(entry) == summary(entry.load()) != ""


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_option_has_help(name):
    assert [option.field for option in options_of(PASSES.find(name).load()) if not option.help] == []


def test_a_class_of_a_package_is_a_pass(site):
    install("sample", site)
    entry = PASSES.find("annotate")
    assert (entry.package, entry.built_in) == ("sample-passes 1.2", False)
    assert entry.load()(note="hello").note == "hello"


def test_a_function_of_a_package_is_a_pass_with_its_parameters_as_options(site):
    install("sample", site)
    made = PASSES.find("swap-addends").load()
    assert made.name == "swap-addends"
    assert made() == made(limit=1000)
    assert summary(made) == "Swap the inputs of each Add."


def test_an_unknown_name_is_an_error_with_those_that_are_close_or_all(site):
    install("sample", site)
    with pytest.raises(UsageError, match=r"unknown pass 'anotate'; did you mean annotate\?"):
        PASSES.find("anotate")
    with pytest.raises(UsageError, match=r"unknown pass 'x'; expected one of inject, .*annotate, swap-addends"):
        PASSES.find("x")


def test_a_name_conflict_names_both_packages(site):
    install("clashing", site)
    install("sample", site)
    with pytest.raises(
        PluginError, match=r"kvsurgeon \(kvsurgeon.passes.cache.inject:Inject\) and clashing-passes 3 \(clash"
    ):
        PASSES.find("inject")
    assert [entry.name for entry in PASSES.plugins() if not entry.built_in] == ["annotate", "swap-addends"]
    assert "inject" not in {entry.name for entry in PASSES.plugins()}


def test_a_pass_may_not_have_the_name_of_a_command(site):
    install("clashing", site)
    points = next(site.glob("*.dist-info")) / "entry_points.txt"
    points.write_text("[kvsurgeon.passes]\nverify = clashing_passes:Inject\n")
    with pytest.raises(PluginError, match=r"two passes are called verify: of kvsurgeon \(the command\) and clashing"):
        PASSES.find("verify")


def test_an_import_error_names_the_pass_when_it_is_loaded(site):
    install("troubled", site)
    assert "missing" in [entry.name for entry in PASSES.plugins()]
    with pytest.raises(PluginError, match=r"pass missing of troubled-passes 0.1 .*ModuleNotFoundError.*nowhere"):
        PASSES.find("missing").load()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("other = clashing_passes:Inject", "the class is called inject"),
        ("other = typing:ClassVar", "expected a class with a method `apply`|expected a pass class or a function"),
        ("other = sys:maxsize", "expected a pass class or a function, found int"),
        ("other = pathlib:Path", "expected a class with a method `apply`"),
        ("other = sys:nothing", "AttributeError"),
    ],
)
def test_an_object_that_is_no_pass_is_an_error(site, line, message):
    install("clashing", site)
    (next(site.glob("*.dist-info")) / "entry_points.txt").write_text(f"[kvsurgeon.passes]\n{line}\n")
    with pytest.raises(PluginError, match=rf"pass other of clashing-passes 3 .*({message})"):
        PASSES.find("other").load()


def test_a_function_without_annotation_is_an_error(site):
    install("troubled", site)
    with pytest.raises(PluginError, match=r"pass unannotated: .*gs.Graph, ir.Model or Subject, found no annotation"):
        PASSES.find("unannotated").load()
