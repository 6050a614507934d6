"""The package as a whole: what it exports, what importing it costs, what is committed."""

import json
import os
import re
import statistics
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import seqpar

ROOT = Path(__file__).parent.parent

PUBLIC = [
    "__version__",
    "batching",
    "comm",
    "hf",
    "init_mesh",
    "kernels",
    "kv",
    "layers",
    "partition",
    "plan",
    "ragged",
]


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout


def test_public_names() -> None:
    assert seqpar.__all__ == PUBLIC
    assert dir(seqpar) == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(seqpar, name) is not None


@pytest.mark.parametrize("name", ["batching", "comm", "kernels", "kv", "layers", "partition", "plan", "ragged", "hf"])
def test_every_package_lists_what_it_exports(name: str) -> None:
    module = getattr(seqpar, name)
    assert sorted(set(module.__all__)) == sorted(module.__all__)
    assert all(hasattr(module, public) for public in module.__all__)


def test_unknown_attribute() -> None:
    with pytest.raises(AttributeError, match="module 'seqpar' has no attribute 'nothing'"):
        seqpar.nothing  # noqa: B018


def test_version_is_that_of_the_project_file() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert seqpar.__version__ == project["version"]
    assert f"version: {project['version']}\n" in (ROOT / "CITATION.cff").read_text()


def test_import_loads_neither_torch_nor_transformers() -> None:
    loaded = json.loads(python("import sys, json, seqpar; print(json.dumps(sorted(sys.modules)))"))
    assert not {"torch", "transformers", "triton", "jaxtyping"} & set(loaded)


def test_core_needs_no_transformers() -> None:
    use = "; ".join(f"seqpar.{name}" for name in ("batching", "comm", "kernels", "kv", "layers", "plan", "init_mesh"))
    loaded = json.loads(python(f"import sys, json, seqpar; {use}; print(json.dumps(sorted(sys.modules)))"))
    assert "torch" in loaded and not {"transformers", "huggingface_hub", "matplotlib"} & set(loaded)


def test_without_transformers_hf_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['transformers'] = None\nimport seqpar\n"
        "try:\n    seqpar.hf\nexcept ModuleNotFoundError as error:\n    print(error.name, error)"
    )
    name, message = python(code).split(maxsplit=1)
    assert name == "transformers" and message.endswith("pip install 'seqpar[hf]'\n")


def test_import_time() -> None:
    """`import seqpar` after `import torch` costs at most a tenth of `import torch`.

    Both are timed in the same process, so a busy machine slows both; the median of the ratios rejects the odd stall.
    """
    code = (
        "import time; a = time.perf_counter(); import torch; b = time.perf_counter(); import seqpar; "
        "c = time.perf_counter(); print((c - b) / (b - a))"
    )
    ratios = [float(python(code)) for _ in range(3)]
    assert statistics.median(ratios) <= 0.10, ratios


def test_files_of_a_release() -> None:
    """Licence, citation and changelog say the same as the project file."""
    import yaml

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert project["license"] == citation["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text() and (ROOT / "src/seqpar/py.typed").exists()
    assert {"cff-version", "title", "authors", "version", "type"} <= citation.keys()
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.slow
def test_the_wheel_installs_and_imports_alone(tmp_path: Path) -> None:
    """Built as a user's pip builds it, and imported from what it holds, beside nothing but the packages it names.

    In an environment of its own torch would be downloaded; here a directory with the wheel's files comes before all
    else, and the checkout is not on the path.
    """
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("seqpar-*.whl")
    with zipfile.ZipFile(wheel) as files:
        files.extractall(tmp_path / "site")
        names = set(files.namelist())
    sources = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src").rglob("*.py")}
    assert sources | {"seqpar/py.typed"} <= names
    assert {name.split("/")[0] for name in names} == {"seqpar", f"seqpar-{seqpar.__version__}.dist-info"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    metadata = next((tmp_path / "site").glob("*.dist-info/METADATA")).read_text()
    needed = re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*(?:; platform_system.*)?$", metadata, re.MULTILINE)
    assert set(needed) == {"torch", "triton", "einops", "safetensors", "jaxtyping"}
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('transformers', 'matplotlib', 'starlette', 'yaml')));"
        "import seqpar; from seqpar import batching, comm, kernels, kv, layers, partition, plan, ragged;"
        "import torch; mesh = seqpar.init_mesh(device='cpu');"
        "layer = layers.RowParallelLinear(8, 4, group=comm.groups(mesh).tp);"
        "print(seqpar.__file__, tuple(layer(torch.ones(3, 8)).shape), seqpar.__version__)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == [str(tmp_path / "site/seqpar/__init__.py"), "(3,", "4)", seqpar.__version__]


def committed_text() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    suffixes = {".py", ".md", ".toml", ".txt", ".cff", ".yml", ".json", ""}
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [path for path in paths if path.suffix in suffixes and path.is_file() and path.stat().st_size < 1 << 20]


FORBIDDEN = {
    "a path of somebody's machine": r"(?<![\w./])/(?:home|root|work|Users)/\w",
    "a to-do without a link or a version": r"\b(?:TODO|FIXME|XXX)\b(?!.*(?:https?://|v?\d+\.\d+))",
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_nothing_committed_has(what: str) -> None:
    pattern = re.compile(FORBIDDEN[what])
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in committed_text()
        if path != Path(__file__)
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found, f"{what}:\n" + "\n".join(found)


def test_core_reads_no_environment() -> None:
    found = [
        str(path.relative_to(ROOT))
        for path in (ROOT / "src/seqpar").rglob("*.py")
        if path.relative_to(ROOT / "src/seqpar").parts[0] not in {"hf", "__main__.py"}
        and re.search(r"\bos\.(?:environ|getenv)\b", path.read_text())
    ]
    # init_mesh starts the process group from what torchrun hands over.
    assert set(found) <= {"src/seqpar/comm/mesh.py"}
