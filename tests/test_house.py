"""The house is in order:

    pytest tests/test_house.py

    imports   run one way: bench -> tools -> stages -> model.py -> lib, with two exceptions, and
              in no circle
    names     each file, option, function, test, heading and link that README.md or docs/ names
              exists
"""

import ast
import graphlib
import importlib
import re
import shlex
from functools import lru_cache

import pytest
from pages import ALL, BENCHES, PAGES, ROOT, SCRIPTS, SPANS, TEXTS, TOOLS, options_of, python

import data_gen

# ------------------------------------------------------------------------------------------------
# Imports

SOURCES = {
    str(path.relative_to(ROOT)): path.read_text("utf-8")
    for folder in ["", "lib/", "tools/", "tools/data/", "bench/", "docs/", "tests/"]
    for path in ROOT.glob(f"{folder}*.py")
}
STAGES = ["data_gen.py", "sft.py", "train_rm.py", "ppo.py"]
# who may import whom against the rule: data_gen.py calls its commands, the demo the stages before
EXCEPTIONS = {
    (importer, imported)
    for importer, those in [
        ("data_gen.py", [path for path in SOURCES if path.startswith("tools/data/")]),
        ("ppo.py", STAGES[:3]),
    ]
    for imported in those
}


def layer(path):
    """How far down a file stands; a file may import from its own layer or from below it."""
    folder = path.split("/")[0]
    if folder == "tests" or path.startswith("test_"):
        return 0
    if path == "model.py" or path in STAGES:
        return 4 if path == "model.py" else 3
    return {"docs": 1, "bench": 1, "tools": 2, "lib": 5}[folder]


@lru_cache(maxsize=None)
def modules_in(source):
    """The names of the modules that a source may import, wherever it does so; "package." stands for
    every module of the package. Of `from a import b`, a.b: b may be a module or something in a."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call):
            function = getattr(node.func, "attr", getattr(node.func, "id", None))
            if function in ("import_module", "__import__"):
                texts = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
                names |= {text for text in texts if isinstance(text, str)}
    return names


def files_of(name, paths):
    """The files, of these paths, that a name from `modules_in` imports."""
    if name.endswith("."):
        return {path for path in paths if path.startswith(name.replace(".", "/"))}
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        for path in ("/".join(parts[:n]) + ".py", "/".join([*parts[:n], "__init__.py"])):
            if path in paths:
                return {path}
    return set()


def imports_of(sources):
    """{(importer, imported)} among the files {path: source}, of those that are no tests: a test may
    import anything."""
    return {
        (path, imported)
        for path, source in sources.items()
        if layer(path) > 0
        for name in modules_in(source)
        for imported in files_of(name, sources)
        if imported != path
    }


def backward(imports):
    """Those of the imports that go against the rule. A stage imports no other stage."""
    return sorted(
        (importer, imported)
        for importer, imported in imports - EXCEPTIONS
        if layer(imported) < layer(importer) or {importer, imported} <= set(STAGES)
    )


def circle(imports):
    """The files of a circle of imports, or None."""
    sorter = graphlib.TopologicalSorter()
    for importer, imported in imports - EXCEPTIONS:
        sorter.add(importer, imported)
    try:
        sorter.prepare()
    except graphlib.CycleError as error:
        return error.args[1]


def test_imports_go_one_way_and_in_no_circle():
    imports = imports_of(SOURCES)
    assert backward(imports) == []
    assert circle(imports) is None
    # it does see them: those at the top, and those of a function, as some exceptions are
    assert ("ppo.py", "model.py") in imports and ("model.py", "lib/checkpoints.py") in imports
    assert ("tools/look.py", "ppo.py") in imports
    assert {("data_gen.py", "tools/data/import_.py"), ("ppo.py", "train_rm.py")} <= imports


@pytest.mark.parametrize(
    "path, line",
    [
        ("lib/run.py", "import model"),
        ("lib/run.py", "from ppo import gae"),
        ("lib/run.py", "from tools.budget import settings"),
        ("model.py", "def f():\n    import sft"),
        ("model.py", "from tools import chat"),
        ("sft.py", "import train_rm as rm"),
        ("sft.py", "from tools import look"),
        ("sft.py", "from tools.data.import_ import convert"),
        ("train_rm.py", "from ppo import kl_estimate"),
        ("ppo.py", "if True:\n    from tools.budget import settings"),
        ("ppo.py", 'import importlib\nimportlib.import_module("tools.chat")'),
        ("ppo.py", 'from importlib import import_module\nimport_module(f"tools.data.{name}")'),
        ("ppo.py", '__import__("bench.speed")'),
        ("data_gen.py", "import sft"),
        ("data_gen.py", "from tools import chat"),
        ("tools/chat.py", "from bench import speed"),
        ("tools/chat.py", "from docs.exact_sums import score"),
        ("bench/speed.py", "from tests.waits import waits_of_steps"),
        ("tools/look.py", "import test_ppo_math"),
    ],
)
def test_an_import_that_runs_back_is_found(path, line):
    imports = imports_of(SOURCES | {path: f"{SOURCES[path]}\n{line}\n"})
    (found,) = backward(imports) if "{" not in line else backward(imports)[:1]
    assert found[0] == path and found not in imports_of(SOURCES)


@pytest.mark.parametrize(
    "path, line, others",
    [
        ("lib/errors.py", "def f():\n    from lib import run", {"lib/run.py"}),
        ("lib/errors.py", "import lib.checkpoints", {"lib/checkpoints.py"}),
        ("tools/data/sets.py", "from tools.data import import_", {"tools/data/import_.py"}),
    ],
)
def test_a_circle_is_found(path, line, others):
    imports = imports_of(SOURCES | {path: f"{SOURCES[path]}\n{line}\n"})
    assert backward(imports) == []
    assert others | {path} <= set(circle(imports))


# ------------------------------------------------------------------------------------------------
# Names

OURS = "lib|tools|bench|docs|tests"
ELSEWHERE = {"--quantization"}  # vLLM's
THEIRS = {"judge.py", "my_reward.py"}  # the reader's files


def unknown_options(span):
    """Those of a command's options that its script does not have; of a span without a script, those
    that none has."""
    words = shlex.split(span)
    if words[0].endswith(".py"):
        words = ["python", *words]
    if called := python(words):
        module, given = called
        has_commands = module == "data_gen" and given and given[0] in data_gen.COMMANDS
        known = options_of(module, *given[:1] if has_commands else [])
    else:
        known = ELSEWHERE.union(*map(options_of, SCRIPTS[:-1] + TOOLS + BENCHES))
        known |= {o for command in data_gen.COMMANDS for o in options_of("data_gen", command)}
    return {word.split("=")[0] for word in words if word.startswith("--")} - known


def missing_names(span):
    """What stands in a span as `module.name`, or as a module of a package, and does not exist."""
    missing = set()
    stem = "|".join(path.stem for path in ROOT.glob("*.py"))
    for name in re.findall(rf"(?<![\w./-])(?:(?:{OURS}|{stem})(?:\.\w+)+)(?![\w/])", span):
        if re.search(r"\.(py|json|safetensors)$", name):
            continue  # a file
        module, rest = name, []
        while module and not (ROOT / (module.replace(".", "/") + ".py")).exists():
            module, _, last = module.rpartition(".")
            rest.insert(0, last)
        thing = importlib.import_module(module) if module else None
        for part in rest:
            thing = getattr(thing, part, None)
        if thing is None:
            missing.add(name)
    return missing


def missing_files(text):
    """Of the words of a span or a command those that look like a Python file, a patch, or a path
    into a folder of ours, and are not there."""
    words = re.findall(rf"(?<![\w/.-])(?:[\w/]+\.(?:py|diff)|(?:{OURS})/[\w./*-]*)(?![\w/])", text)
    return {
        word
        for word in {word.rstrip(".") for word in words} - THEIRS
        if not any(ROOT.glob(word)) and not any(ROOT.glob(f"bench/*/{word}"))
    }


def anchors(text):
    """Of each heading, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(page, text):
    """The links and pictures of a page with this text that lead nowhere."""
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        name, _, heading = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        lost = heading and heading not in anchors(TEXTS.get(target, ""))
        if "://" not in link and (lost or not target.exists()):
            dead.append(link)
    return dead


@pytest.mark.parametrize("span", [span for span in SPANS if re.search(r"(^| )--\w", span)])
def test_options_exist(span):
    assert unknown_options(span) == set()


def test_functions_and_modules_exist():
    assert {span: names for span in SPANS if (names := missing_names(span))} == {}


def test_files_exist():
    texts = SPANS + [" ".join(words) for words, _ in ALL]
    assert {text: files for text in texts if (files := missing_files(text))} == {}


def test_tests_exist():
    sources = [
        path.read_text("utf-8") for path in [*ROOT.glob("test_*.py"), *ROOT.glob("tests/test_*.py")]
    ]
    named = {span for span in SPANS if re.fullmatch(r"test_\w+", span)}
    assert named and named <= {
        name for source in sources for name in re.findall(r"^def (test_\w+)\(", source, re.M)
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_and_pictures_lead_somewhere(page):
    assert dead_links(page, TEXTS[page]) == []


def test_every_page_and_picture_is_linked_to():
    linked = {
        (page.parent / link.partition("#")[0]).resolve()
        for page, text in TEXTS.items()
        for link in re.findall(r"\]\(([^)\s]+)\)", text)
        if "://" not in link
    }
    assert {path for path in ROOT.glob("docs/*")} <= linked


def test_what_does_not_exist_is_found():
    assert unknown_options("--kl_coef 0 --klcoef 0") == {"--klcoef"}
    assert unknown_options("python sft.py --lr 1 --kl_coef 0") == {"--kl_coef"}
    assert unknown_options("train_rm.py --loss=ranking --gae") == {"--gae"}
    assert unknown_options("data_gen.py sums --digits 2 --judge x") == {"--judge"}
    assert missing_names("see ppo.gae, ppo.game(x) and ScalarHead") == {"ppo.game"}
    assert missing_names("lib.run.Run.finish lib.run.Run.start") == {"lib.run.Run.start"}
    assert missing_names("python -m tools.data.sums tools.sums") == {"tools.sums"}
    assert missing_names("lib/run.py model.safetensors tools.chat.main") == set()
    assert missing_files("pytest tests/test_house.py tests/test_home.py") == {"tests/test_home.py"}
    assert missing_files("ppo.py, ppo2.py, lib/, lid.py, libs/") == {"ppo2.py", "lid.py"}
    assert missing_files("grpo.diff bench/forks/*.diff bench/forks/grp.diff docs/x.png") == {
        "bench/forks/grp.diff",
        "docs/x.png",
    }
    readme = ROOT / "README.md"
    good, bad = "[a](docs/data.md#import) [b](#shapes)", "[a](docs/data.md#export) [b](#shape)"
    assert dead_links(readme, good + "![](docs/rlhf.svg) [x](https://x.org/#a)") == []
    assert dead_links(readme, bad + "[](doc/data.md)") == [
        "docs/data.md#export",
        "#shape",
        "doc/data.md",
    ]
