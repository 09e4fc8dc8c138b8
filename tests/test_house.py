"""The habits of the house, enforced on every file and every method, chosen by what they are and never by name."""

import ast
import dataclasses
import doctest
import importlib
import importlib.util
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from thrifty import contracts, registry
from thrifty.contracts import FAMILIES
from thrifty.papers import papers

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src" / "thrifty").rglob("*.py"))
METHODS = registry.methods(plugins=False)
TEMPLATES = sorted((ROOT / "templates").glob("*.py"))
HANDBOOKS = [p for p in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("changelog.d/*.md")) if p.is_file()]

RANKS = [
    {"contracts"},
    {"evidence", "files", "registry", "papers", "progress", "fields"},
    {"tasks"},
    {"models"},
    {"engines"},
    {"traces"},
    {"tune"},
    {"weights"},
    {"decode"},
    {"solve"},
    {"measure"},
    {"recipes", "assets", "lab", "controls", "trial", "claims"},
    {"report", "conformance"},
    {"serve", "edges", "cli", "commands"},
]
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}
"""Data flows one way: a package imports those of a lower rank, and its own."""
INDEX = {"thrifty.assets"}
"""Names what ships and where it lies; imports contracts only, and so may stand left of the modules that build it."""


def module(path: Path) -> str:
    parts = path.relative_to(ROOT / "src").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """Full names of all modules that ``path`` imports, inside functions and for type checkers too."""
    package = module(path) if path.name == "__init__.py" else module(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


MODULES = {module(path): path for path in SOURCES}


def imported_modules(path: Path) -> set[str]:
    return {name for name in imports(path) if name in MODULES and name != "thrifty"}


def package(name: str) -> str:
    return name.split(".")[1]


def ids(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# ------------------------------------------------------------------------------------------- every source


@pytest.mark.parametrize("path", SOURCES, ids=ids)
def test_imports_flow_one_way(path):
    name = module(path)
    if name == "thrifty":
        assert imported_modules(path) <= {"thrifty.contracts"}
        return
    assert package(name) in RANK, f"{name}: give the package a place in RANKS"
    rank = 1 if name in INDEX else RANK[package(name)]
    others = {other for other in imported_modules(path) - INDEX if package(other) != package(name)}
    right = {other for other in others if RANK[package(other)] > rank}
    assert not right, f"{name} imports to its right"


@pytest.mark.parametrize("path", SOURCES, ids=ids)
def test_nothing_unsafe_is_loaded(path):
    unsafe = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    assert not {name.split(".")[0] for name in imports(path)} & unsafe
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Call):
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            trusted = ast.unparse(given.get("trust_remote_code", ast.Constant(False)))
            assert trusted == "False", f"line {node.lineno}: remote code"
            match node.func:
                case ast.Attribute(value=ast.Name(id="torch"), attr="load"):
                    only = ast.unparse(given.get("weights_only", ast.Constant(None)))
                    assert only == "True", f"line {node.lineno}: torch.load"
                case ast.Name(id="eval" | "exec"):
                    pytest.fail(f"line {node.lineno}: {node.func.id}")


@pytest.mark.parametrize("path", SOURCES, ids=ids)
def test_every_module_says_what_it_is_for(path):
    assert (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").strip(), "no docstring"


# ------------------------------------------------------------------------------------------- every method


@pytest.fixture(params=METHODS.values(), ids=lambda method: method.key)
def method(request):
    return request.param


def test_a_method_imports_no_other_method(method):
    """Parts reach a method as fields. Recipes are made of methods, and nothing imports a recipe."""
    others = {m.module: m for m in METHODS.values() if m.key != method.key}
    used = {others[name] for name in imports(method.path) if name in others}
    if method.family == "recipes":
        used = {m for m in used if m.family == "recipes"}
    assert not {m.key for m in used}
    helpers = {name for name in imported_modules(method.path) if name.rpartition(".")[2].startswith("_")}
    own = f"thrifty.{method.family}."
    assert all(name.startswith(own) for name in helpers), "a helper of another family"


def test_nothing_but_the_registry_reaches_a_recipe():
    recipes = {m.module for m in METHODS.values() if m.family == "recipes"}
    assert not {(module(p), name) for p in SOURCES for name in imported_modules(p) & recipes}


def test_a_method_never_counts(method):
    """The meter stands on the model and the runner counts text; a method that makes a Usage counts by itself."""
    if method.family.startswith("measure.") or method.family == "recipes":
        return
    made = {
        node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        for node in ast.walk(ast.parse(method.path.read_text("utf-8")))
        if isinstance(node, ast.Call)
    }
    assert "Usage" not in made


def test_a_method_is_a_frozen_dataclass_that_can_be_made_bare(method):
    cls = registry.method_class(method)
    assert cls.__dataclass_params__.frozen
    assert not hasattr(cls, "__post_init__"), "the constructor only stores"
    made = cls()
    assert dataclasses.replace(made) == made
    unexplained = [spec.name for spec in dataclasses.fields(cls) if not spec.metadata.get("help")]
    assert not unexplained, 'field(default=..., metadata={"help": ...})'


def test_a_methods_card_agrees_with_the_papers_facts(method):
    card, paper = method.card, papers().get(method.key)
    assert (paper is None) or not card.baseline, "a baseline stands in no paper list"
    if paper is not None:
        assert (card.title, card.arxiv, card.year) == (paper.title, paper.arxiv, paper.year)
        assert set(card.saves) <= set(paper.saves)
    known = set(re.findall(r'"(\w+)"', contracts.Engine.__doc__ or ""))
    assert set(card.needs) <= known, f"an engine's capabilities are {sorted(known)}"


def test_a_methods_docstring_names_paper_departures_and_an_example(method):
    docstring = ast.get_docstring(ast.parse(method.path.read_text("utf-8"))) or ""
    assert len(docstring.splitlines()[0]) > 20, "the first line says what it saves and how"
    if not method.card.baseline:
        for section in ("Paper:", "Differs:"):
            assert re.search(rf"^{section} *\S", docstring, re.MULTILINE), f"no {section}"
        if method.card.arxiv:
            assert method.card.arxiv in docstring


def test_a_methods_examples_are_right(method):
    result = doctest.testmod(importlib.import_module(method.module))
    assert result.failed == 0
    assert result.attempted or method.card.baseline or method.family == "recipes", "no value worked by hand"


BESIDE = sorted({p for p in SOURCES if ">>>" in p.read_text("utf-8")} - {method.path for method in METHODS.values()})


@pytest.mark.parametrize("path", BESIDE, ids=module)
def test_an_example_outside_of_methods_is_right(path):
    try:
        found = importlib.import_module(module(path))
    except ModuleNotFoundError as error:
        pytest.skip(f"{error.name} is not installed")
    assert doctest.testmod(found).failed == 0


# ---------------------------------------------------------------------------------------- for newcomers


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_a_template_is_a_method_as_it_stands(template, tmp_path, monkeypatch):
    assert template.stem in FAMILIES
    monkeypatch.chdir(tmp_path)
    target = tmp_path / "methods" / template.stem / "my_method.py"
    target.parent.mkdir(parents=True)
    shutil.copy(template, target)
    cls = registry.load("my-method")
    assert registry.find("my-method").family == template.stem
    assert cls.__dataclass_params__.frozen
    assert cls() == cls()
    assert all(spec.metadata.get("help") for spec in dataclasses.fields(cls))
    found = doctest.DocTestFinder().find(registry._import(registry.find("my-method")), "template")
    runner = doctest.DocTestRunner(verbose=False)
    assert sum(runner.run(test).failed for test in found) == 0
    assert runner.tries > 0
    docstring = ast.get_docstring(ast.parse(template.read_text("utf-8"))) or ""
    assert "Paper:" in docstring
    assert "Differs:" in docstring


@pytest.mark.parametrize("page", HANDBOOKS, ids=ids)
def test_links_in_the_handbooks_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?://|mailto:|#)([^)#\s]+)[^)]*\)", page.read_text("utf-8"))
    links += re.findall(
        r"<(?:img|source|a)\b[^>]*(?:src|srcset|href)=\"(?!https?://|#)([^\"#]+)\"", page.read_text("utf-8")
    )
    assert not [link for link in links if not (page.parent / link).exists()]
