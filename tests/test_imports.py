"""Imports run only downwards (scripts -> finetuning -> phi3v), and nothing needs remote code or an optional library."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Optional: torchvision has no CPU build, flash_attn no wheels, the others only serve some flags.
OPTIONAL = {"torchvision", "flash_attn", "bitsandbytes", "liger_kernel", "trl"}


def project_files() -> list[Path]:
    folders = [folder for folder in ("phi3v", "finetuning", "benchmarks", "launch") if (ROOT / folder).is_dir()]
    return sorted([*ROOT.glob("*.py"), *(file for folder in folders for file in (ROOT / folder).rglob("*.py"))])


def imported_modules(tree: ast.AST, package: str = "") -> set[str]:
    """Full names of all imported modules, those inside functions too; `from . import x` counts as package.x."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            found |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    return found


def top_level(tree: ast.Module) -> ast.Module:
    """Only what runs when the file is imported, an `if` or a `try` included: no function."""
    kept = [node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return ast.Module(body=kept, type_ignores=[])


def roots(modules: set[str]) -> set[str]:
    return {module.split(".")[0] for module in modules}


def forbidden_imports(file: str, source: str, scripts: set[str]) -> set[str]:
    """What a file of the project (path from the root) imports and must not."""
    folder = file.split("/")[0] if "/" in file else ""
    tree = ast.parse(source)
    package = ".".join(Path(file).parts[:-1])
    modules = roots(imported_modules(tree, package))
    forbidden = roots(imported_modules(top_level(tree), package)) & OPTIONAL
    above = {
        "phi3v": scripts | {"finetuning", "demo", "benchmarks", "tests"},
        "finetuning": scripts | {"demo", "benchmarks", "tests"},
        "": (scripts if Path(file).stem in scripts else set()) | {"tests"},
    }
    return forbidden | (modules & above.get(folder, set())) | rooms_above(file, tree, package)


# The rooms of finetuning/, each of which imports only itself and those before it; a command is any other file.
ROOMS = [
    "errors",
    "environment",
    "lora_fields",
    "arguments",
    "own_data_arguments",
    "data",
    "training",
    "results",
    "commands",
]


def room_of(module: str) -> int | None:
    """Number of the room in which a module of finetuning/ lies."""
    parts = module.split(".")
    if parts[0] != "finetuning" or len(parts) < 2:
        return None
    return ROOMS.index(parts[1]) if parts[1] in ROOMS else len(ROOMS) - 1


def rooms_above(file: str, tree: ast.AST, package: str) -> set[str]:
    """Modules of finetuning/ that a file imports from a room above its own."""
    own = room_of(".".join(Path(file).with_suffix("").parts))
    if own is None or Path(file).name == "__init__.py":
        return set()
    found = {module: room_of(module) for module in imported_modules(tree, package)}
    return {module for module, room in found.items() if room is not None and room > own}


def remote_code(source: str) -> list[int]:
    """Lines that pass or set trust_remote_code to anything but False."""
    values = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            values.append(node.value)
        elif isinstance(node, ast.Assign):
            values += [node.value for target in node.targets if "trust_remote_code" in ast.unparse(target)]
        elif isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            values += [value for key, value in pairs if getattr(key, "value", None) == "trust_remote_code"]
    return [value.lineno for value in values if not (isinstance(value, ast.Constant) and value.value is False)]


SCRIPTS = {path.stem for path in ROOT.glob("finetune_*.py")}


@pytest.mark.parametrize("file", [str(path.relative_to(ROOT)) for path in project_files()])
def test_file_imports_only_downwards_and_never_remote_code(file):
    source = (ROOT / file).read_text()
    assert not forbidden_imports(file, source, SCRIPTS)
    assert not remote_code(source), f"{file}: trust_remote_code at lines {remote_code(source)}"


SOME_SCRIPTS = {"finetune_hf_trainer_docvqa", "finetune_hf_trainer_nlvr2"}


@pytest.mark.parametrize(
    ("file", "source", "found"),
    [
        ("phi3v/modeling_phi3_v.py", "from finetuning.data.collator import x", {"finetuning"}),
        ("phi3v/modeling_phi3_v.py", "def f():\n    import finetuning.results.metrics", {"finetuning"}),
        ("phi3v/modeling_phi3_v.py", "import importlib\nimportlib.import_module('finetuning')", {"finetuning"}),
        ("phi3v/modeling_phi3_v.py", "from .configuration_phi3_v import Phi3VConfig", set()),
        ("phi3v/modeling_phi3_v.py", "import torchvision.transforms as T", {"torchvision"}),
        ("phi3v/modeling_phi3_v.py", "try:\n    import flash_attn\nexcept ImportError:\n    pass", {"flash_attn"}),
        ("phi3v/modeling_phi3_v.py", "def f():\n    import flash_attn", set()),
        ("finetuning/training/lora.py", "from phi3v import Phi3VConfig", set()),
        ("finetuning/training/lora.py", "import finetune_hf_trainer_nlvr2 as n", {"finetune_hf_trainer_nlvr2"}),
        ("finetuning/training/lora.py", "import bitsandbytes", {"bitsandbytes"}),
        ("finetuning/training/lora.py", "from demo import build_model", {"demo"}),
        ("finetuning/training/lora.py", "from ..arguments import RecipeArguments", set()),
        ("finetuning/training/lora.py", "from ..data.dataset import x", set()),
        ("finetuning/training/lora.py", "from .loading import x", set()),
        (
            "finetuning/data/dataset.py",
            "def f():\n    from ..training import seal",
            {"finetuning.training", "finetuning.training.seal"},
        ),
        (
            "finetuning/data/dataset.py",
            "from ..results.metrics import anls",
            {"finetuning.results.metrics", "finetuning.results.metrics.anls"},
        ),
        (
            "finetuning/training/trainer.py",
            "from finetuning.results.report import x",
            {"finetuning.results.report", "finetuning.results.report.x"},
        ),
        (
            "finetuning/arguments.py",
            "from .data.images import x",
            {"finetuning.data.images", "finetuning.data.images.x"},
        ),
        ("finetuning/errors.py", "from .environment import x", {"finetuning.environment", "finetuning.environment.x"}),
        ("finetuning/results/report.py", "from ..validate import x", {"finetuning.validate", "finetuning.validate.x"}),
        ("finetuning/validate.py", "from .results.report import x", set()),
        ("finetune_hf_trainer_docvqa.py", "from finetune_hf_trainer_nlvr2 import f", {"finetune_hf_trainer_nlvr2"}),
        ("finetune_hf_trainer_docvqa.py", "from finetuning.results.metrics import anls", set()),
        ("demo.py", "from finetune_hf_trainer_docvqa import main", set()),
    ],
)
def test_the_check_itself_finds_what_it_looks_for(file, source, found):
    assert forbidden_imports(file, source, SOME_SCRIPTS) == found


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("f(x, trust_remote_code=True)", [1]),
        ("\nf(x, trust_remote_code=flag)", [2]),
        ("args = {'trust_remote_code': True}", [1]),
        ("args.trust_remote_code = True", [1]),
        ("f(x, trust_remote_code=False)", []),
        ("'never trust_remote_code=True'", []),
    ],
)
def test_the_check_itself_finds_remote_code(source, lines):
    assert remote_code(source) == lines


def test_the_files_of_the_project_are_found():
    names = {path.name for path in project_files()}
    assert {"modeling_phi3_v.py", "image_processing_phi3_v.py", "demo.py"} <= names


def test_few_private_methods_of_the_trainer_are_overridden():
    # Each is a debt: a new version of transformers may change it without a word.
    from transformers import Trainer

    from finetuning.training.trainer import RecipeTrainer

    private = {name for name in vars(RecipeTrainer) if name.startswith("_") and not name.startswith("__")}
    assert {name for name in private if hasattr(Trainer, name)} == {"_save_checkpoint"}


def print_house() -> None:
    """Prints each file of the packages with its lines, its job and what it imports of the project."""
    for file in project_files():
        name, source = str(file.relative_to(ROOT)), file.read_text(encoding="utf-8")
        tree = ast.parse(source)
        job = (ast.get_docstring(tree) or "").split("\n")[0]
        if name.startswith("benchmarks/") or file.name == "__init__.py":
            continue
        package = ".".join(Path(name).parts[:-1])
        own = {module for module in imported_modules(tree, package) if roots({module}) & {"phi3v", "finetuning"}}
        files = {module for module in own if (ROOT / (module.replace(".", "/") + ".py")).exists()}
        print(f"{name:46}{len(source.splitlines()):5}  {job}")
        print(f"{'':53}<- {', '.join(sorted(files)) or 'nothing'}")


if __name__ == "__main__":
    print_house()
