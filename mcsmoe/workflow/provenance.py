"""Which code an artefact was made by: the digest of a script and of every module of ours it can reach.

Snakemake tracks a rule's script but not the modules it imports; each rule carries this digest as a parameter, so that
changing a library module reruns exactly the rules that use it.
"""

from __future__ import annotations

import ast
import hashlib
from functools import cache
from itertools import accumulate
from pathlib import Path

PACKAGE = "mcsmoe"
ROOT = Path(__file__).resolve().parents[2]
_BODIES = ("body", "orelse", "finalbody", "handlers", "cases")  # of the statements that hold others


def _module_file(module: str) -> Path | None:
    base = ROOT.joinpath(*module.split("."))
    for candidate in (base.with_suffix(".py"), base / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


def _imports(file: Path) -> frozenset[str]:
    """Modules of ours that ``file`` names in an import statement, at the top or inside a function."""
    found: set[str] = set()
    todo: list[ast.AST] = list(ast.parse(file.read_text(), filename=str(file)).body)
    while todo:
        node = todo.pop()
        # Imports are statements, and only statements hold statements: what is inside of expressions is not looked at.
        todo += [inner for field in _BODIES for inner in getattr(node, field, ())]
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return frozenset(name for name in found if name.startswith(f"{PACKAGE}."))


@cache
def _files(file: Path) -> frozenset[Path]:
    """Files of ours that the import statements of ``file`` run: the modules they name, and the packages these lie in."""
    names = {name for module in _imports(file) for name in accumulate(module.split("."), "{}.{}".format)}
    return frozenset(target for name in names - {PACKAGE} if (target := _module_file(name)) is not None)


def modules_used(script: str | Path) -> list[Path]:
    """Files of ours that ``script`` reaches through imports, itself included, sorted.

    The package's own ``__init__`` is only a facade for users and is never counted; those of sub-packages are.
    """
    todo, seen = {Path(script).resolve()}, set[Path]()
    while todo:
        seen |= todo
        todo = set[Path]().union(*(_files(file) for file in todo)) - seen
    return sorted(seen)


def code_digest(script: str | Path) -> str:
    """First 16 hexadecimal digits of the SHA-256 over the code of ``script`` and of the modules it uses."""
    digest = hashlib.sha256()
    for file in modules_used(script):
        digest.update(str(file.relative_to(ROOT)).encode() + b"\0")
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def digest_of(*files: str | Path) -> str:
    """First 16 hexadecimal digits of the SHA-256 over what ``files`` hold, wherever they lie.

    A rule's parameter in the place of an input whose path tells where the project or the library is, and would rerun
    everything once that is moved.
    """
    digest = hashlib.sha256()
    for file in files:
        content = Path(file).read_bytes()
        digest.update(len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()[:16]
