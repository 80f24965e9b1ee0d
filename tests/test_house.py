"""The layout of the code: one-way imports, rooms that are not too large, one package."""

import ast
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINKED = ("convert", "train", "configs")  # of the package, though they lie beside sa2jax/
LIBRARY = ("sa2jax", *LINKED)


def python_files(*folders: str) -> list[Path]:
    found = (path for folder in folders for path in _walk(ROOT / folder))
    return sorted(found)


def _walk(folder: Path) -> list[Path]:
    """Python files of a folder; links are not followed, so that each file comes once."""
    files = []
    for path in folder.iterdir():
        if path.is_symlink() or path.name.startswith("."):
            continue
        if path.is_dir():
            files += _walk(path)
        elif path.suffix == ".py":
            files.append(path)
    return files


def module_of(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] in LINKED:
        parts.insert(0, "sa2jax")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imports() -> dict[str, set[str]]:
    """What each module imports: at load, in functions, and for types alone."""
    files = {module_of(path): path for path in python_files(*LIBRARY)}
    found: dict[str, set[str]] = {name: set() for name in files}
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}:{node.lineno} imports relatively"
                inner = [f"{node.module}.{alias.name}" for alias in node.names]
                targets = [full if full in files else str(node.module) for full in inner]
            else:
                continue
            ours = {target for target in targets if target.split(".")[0] == "sa2jax"}
            assert ours <= files.keys(), f"{path} imports {ours - files.keys()}"
            found[name] |= ours - {name}
    return found


def circles(arrows: dict[str, set[str]]) -> list[str]:
    """What is left when modules that import nothing of the rest are taken away, and so on."""
    left = {name: set(targets) for name, targets in arrows.items()}
    while done := {name for name, targets in left.items() if not targets}:
        left = {name: targets - done for name, targets in left.items() if name not in done}
    # From the other side, too: what nobody left imports is in no circle.
    while free := left.keys() - set().union(*left.values()):
        left = {name: targets for name, targets in left.items() if name not in free}
    return [
        f"{name} -> {', '.join(sorted(targets & left.keys()))}" for name, targets in left.items()
    ]


def test_a_circle_is_found():
    assert not circles({"a": {"b", "c"}, "b": {"c"}, "c": set()})
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == ["b -> c", "c -> b"]


def test_there_is_no_circle_of_imports():
    assert not circles(imports())


def test_only_tests_import_the_module_for_tests():
    assert not [name for name, targets in imports().items() if "sa2jax.testing" in targets]


@pytest.mark.parametrize(
    "room", ["chat", "pipeline", "inference", "speech", "cli", "convert", "train"]
)
def test_networks_know_nothing_of(room):
    for name, targets in imports().items():
        if name.startswith("sa2jax.models"):
            assert not [t for t in targets if f"{t}.".startswith(f"sa2jax.{room}.")], name


def test_no_folder_is_too_wide():
    files = [path for path in python_files(*LIBRARY) if path.name != "__init__.py"]
    assert not {f: n for f, n in Counter(path.parent for path in files).items() if n > 20}


def test_no_file_is_too_long():
    for path in python_files(*LIBRARY, "tests", "benchmarks", "examples"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 450, path


def test_every_folder_with_code_is_a_package():
    folders = {path.parent for path in python_files(*LIBRARY)}
    assert not [folder for folder in folders if not (folder / "__init__.py").is_file()]


def test_the_packages_that_are_installed_are_those_folders():
    setuptools = pytest.importorskip("setuptools")
    for name in LINKED:
        link = ROOT / "sa2jax" / name
        assert link.is_symlink()
        assert link.readlink() == Path("..") / name
    folders = {path.parent for path in python_files(*LIBRARY)}
    packages = {module_of(folder / "__init__.py") for folder in folders}
    assert set(setuptools.find_packages(str(ROOT), include=["sa2jax*"])) == packages


# Files and texts of unknown origin; what is read here is our own, or another program's of today.
READS = re.compile(
    r"json\.loads?\(|yaml\.(safe_)?load|np\.load\(|safe_open|load_file\(|deserialize\("
)
OWN = {
    "chat/tokenizer.py": "what the tokenizers library tells of itself",
    "chat/tokenizer_files.py": "what the tokenizers library tells of itself",
    "corpus/conversations.py": "the schema of a tool of ours",
    "corpus/tts_engines.py": "a file of an installed package",
    "data/tfio_reader.py": "frames of our own process, in an environment without sa2jax",
    "language/recipe.py": "a copy",
    "networks/recipes.py": "a copy",
    "plan/hlo.py": "what the compiler printed",
    "train/checkpoints.py": "states that the other hosts sent",
}


def test_every_file_is_opened_by_the_one_reader_of_its_kind():
    found = {
        "/".join(path.parts[-2:])
        for path in python_files(*LIBRARY)
        if path.parent.name != "files" and READS.search(path.read_text(encoding="utf-8"))
    }
    assert found == OWN.keys()
