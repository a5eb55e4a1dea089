"""What setup.py decides (quick), and what an installation then holds (marked ``install``: builds, minutes)."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from vaefast import _build
from vaefast._build import BuildInfo

ROOT = Path(__file__).resolve().parents[1]
CPU_TORCH = SimpleNamespace(__version__="2.13.0+cpu", version=SimpleNamespace(cuda=None))
PATHS = sysconfig.get_paths()
CUDA_TORCH = SimpleNamespace(__version__="2.13.0+cu132", version=SimpleNamespace(cuda="13.2"))


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """setup.py as a module, on a source tree with a CUDA file and a machine with a compiler and no CUDA toolkit."""
    spec = importlib.util.spec_from_file_location("vaefast_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    wishes = ("VAEFAST_FORCE_CUDA", "VAEFAST_FORCE_CPU", "VAEFAST_FORCE_PYTHON", "VAEFAST_CPU")
    for name in (*wishes, "TORCH_CUDA_ARCH_LIST", "CUDA_HOME"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    (tmp_path / "csrc" / "cuda" / "ops.cu").touch()
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "unpatched_find_torch", module.find_torch, raising=False)
    monkeypatch.setattr(module, "find_torch", lambda: CPU_TORCH)
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(module, "sysconfig", SimpleNamespace(get_paths=lambda: PATHS | {"include": str(tmp_path)}))
    monkeypatch.setattr(module, "USUAL_NVCC", "/nowhere/nvcc")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("a build machine need not have the GPU"))
    program(tmp_path / "c++", "c++ (Some Linux 12.2.0-14) 12.2.0")
    monkeypatch.setenv("CXX", str(tmp_path / "c++"))
    return module


def program(path: Path, says: str, archs: str = "", top: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    answers = f"--list-gpu-arch) echo '{archs}';; --dryrun) echo '#$ TOP={top}';; *) echo '{says}';;"
    path.write_text(f"#!/bin/sh\ncase $1 in {answers} esac\n")
    path.chmod(0o755)


def toolkit(module: ModuleType, monkeypatch: pytest.MonkeyPatch, release: str, archs: str = "") -> None:
    home = module.ROOT / "cuda"
    program(home / "bin" / "nvcc", f"Cuda compilation tools, release {release}, V{release}.88", archs)
    monkeypatch.setenv("CUDA_HOME", str(home))
    monkeypatch.setattr(module, "find_torch", lambda: CUDA_TORCH)


def test_plan_is_what_build_info_takes(builder: ModuleType) -> None:
    fields = [field.name for field in dataclasses.fields(BuildInfo)]
    assert sorted(builder.plan()) == sorted(fields)


def test_cpu_torch_builds_cpu_kernels_even_with_nvcc(builder: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    toolkit(builder, monkeypatch, "13.0")
    monkeypatch.setattr(builder, "find_torch", lambda: CPU_TORCH)
    build = builder.plan()
    assert build["cpu"][0] == "DEFAULT" and not build["why_no_native"] and not build["cuda"]
    assert build["compiler"] == "g++ 12.2.0"
    assert "2.13.0+cpu has no CUDA; install a CUDA build of torch" in build["why_no_cuda"]


def test_same_cuda_major_builds_for_what_the_toolkit_knows(
    builder: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    toolkit(builder, monkeypatch, "13.0", "compute_75\ncompute_80\ncompute_90\ncompute_110")
    build = builder.plan()
    assert (build["cuda"], build["cuda_archs"]) == ("CUDA 13.0", ("7.5", "8.0", "9.0+PTX"))
    assert not build["why_no_cuda"] and os.environ["TORCH_CUDA_ARCH_LIST"] == "7.5;8.0;9.0+PTX"


def test_wrapper_on_path_leads_to_its_toolkit(builder: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    toolkit(builder, monkeypatch, "13.0", "compute_90")
    monkeypatch.setenv("CUDA_HOME", "")
    wrapper, top = builder.ROOT / "bin" / "nvcc", builder.ROOT / "elsewhere" / "bin" / ".."
    top.parent.mkdir(parents=True)
    program(wrapper, "Cuda compilation tools, release 13.0, V13.0.88", "compute_90", str(top))
    monkeypatch.setenv("PATH", f"{wrapper.parent}:/usr/bin:/bin")
    assert builder.plan()["cuda"] == "CUDA 13.0"
    assert os.environ["CUDA_HOME"] == str(builder.ROOT / "elsewhere")


def test_arch_list_of_the_user_is_kept(builder: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    toolkit(builder, monkeypatch, "13.0", "compute_75")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6 9.0+PTX")
    assert builder.plan()["cuda_archs"] == ("8.6", "9.0+PTX")


LACKS = [
    ("torch", "the build found no torch", "install torch first"),
    ("new torch", "torch 2.5.1 is older than 2.11", "upgrade torch"),
    ("CUDA torch", "torch 2.13.0+cpu has no CUDA", "install a CUDA build of torch"),
    ("nvcc", "no nvcc", "install the CUDA 13 toolkit or set CUDA_HOME"),
    ("right nvcc", "nvcc is CUDA 12.4 but torch 2.13.0+cu132 was built with CUDA 13.2", "install the CUDA 13 toolkit"),
    ("compiler", "CXX=/nowhere/c++ does not run", "install g++"),
    ("headers", "Python.h was not found", "install Python's headers"),
    ("sources", "csrc/cuda has no .cu file", "take a source tree"),
    ("wish for CUDA", "VAEFAST_FORCE_CPU was set", "unset it"),
    ("wish for kernels", "VAEFAST_FORCE_PYTHON was set", "unset it"),
]


@pytest.mark.parametrize(("lack", "fact", "fix"), LACKS, ids=[lack for lack, _, _ in LACKS])
def test_what_lacks_is_a_reason_or_with_force_cuda_an_error(
    builder: ModuleType, monkeypatch: pytest.MonkeyPatch, lack: str, fact: str, fix: str
) -> None:
    toolkit(builder, monkeypatch, "12.4" if lack == "right nvcc" else "13.0", "compute_90")
    if lack in ("torch", "new torch"):
        old = SimpleNamespace(__version__="2.5.1") if lack == "new torch" else None
        monkeypatch.setitem(sys.modules, "torch", old)  # None makes the import fail
        monkeypatch.setattr(builder, "find_torch", builder.unpatched_find_torch)
    elif lack == "CUDA torch":
        monkeypatch.setattr(builder, "find_torch", lambda: CPU_TORCH)
    elif lack == "nvcc":
        monkeypatch.setenv("CUDA_HOME", "")
    elif lack == "compiler":
        monkeypatch.setenv("CXX", "/nowhere/c++")
    elif lack == "headers":
        monkeypatch.setattr(builder.sysconfig, "get_paths", lambda: {"include": "/nowhere"})
    elif lack == "sources":
        Path(builder.ROOT, "csrc", "cuda", "ops.cu").unlink()
    else:
        monkeypatch.setenv(fact.split()[0], "1")

    build = builder.plan()
    pure = lack in ("torch", "new torch", "compiler", "headers", "wish for kernels")
    assert bool(build["why_no_native"]) is pure and bool(build["cpu"]) is not pure and not build["cuda"]
    assert fact in build["why_no_cuda"] and fix in build["why_no_cuda"] and "\n" not in build["why_no_cuda"]

    monkeypatch.setenv("VAEFAST_FORCE_CUDA", "1")
    with pytest.raises(SystemExit, match="VAEFAST_FORCE_CUDA was set, but") as error:
        builder.plan()
    assert fact in str(error.value) and fix in str(error.value)


@pytest.mark.parametrize(
    ("says", "name"),
    [
        ("g++ (GCC) 11.4.1 20230605 (Red Hat 11.4.1-2)", "g++ 11.4.1"),
        ("c++ (Ubuntu 13.2.0-23ubuntu4) 13.2.0", "g++ 13.2.0"),
        ("Debian clang version 14.0.6", "clang++ 14.0.6"),
    ],
)
def test_compiler_in_one_line(builder: ModuleType, monkeypatch: pytest.MonkeyPatch, says: str, name: str) -> None:
    program(Path(os.environ["CXX"]), says)
    assert builder.find_compiler() == name


@pytest.mark.parametrize(("runs", "native"), [("DEFAULT", "DEFAULT"), ("AVX2", "AVX2"), ("AVX512_VNNI", "AVX512")])
def test_instruction_sets_to_compile_for(
    builder: ModuleType, monkeypatch: pytest.MonkeyPatch, runs: str, native: str
) -> None:
    of_machine = SimpleNamespace(backends=SimpleNamespace(cpu=SimpleNamespace(get_cpu_capability=lambda: runs)))
    monkeypatch.setattr(builder.platform, "machine", lambda: "x86_64")
    assert builder.instruction_sets(of_machine) == ("DEFAULT", "AVX2", "AVX512")
    monkeypatch.setenv("VAEFAST_CPU", "native")
    assert builder.instruction_sets(of_machine) == (native,)
    monkeypatch.setattr(builder.platform, "machine", lambda: "aarch64")
    assert builder.instruction_sets(of_machine) == ("DEFAULT",)
    monkeypatch.setattr(builder.platform, "machine", lambda: "x86_64")
    monkeypatch.setenv("VAEFAST_CPU", "avx2")
    with pytest.raises(SystemExit, match="VAEFAST_CPU=avx2, but it takes all"):
        builder.instruction_sets(of_machine)


@pytest.mark.parametrize(
    ("built", "runs", "loads"),
    [
        ("AVX2", "AVX2", True),
        ("AVX2", "AVX512", True),
        ("AVX512", "AVX512_VNNI", True),
        ("DEFAULT", "ZVECTOR", True),
        ("AVX512", "AVX2", False),
        ("AVX2", "DEFAULT", False),
    ],
)
def test_kernels_for_another_machine_are_refused(
    monkeypatch: pytest.MonkeyPatch, built: str, runs: str, loads: bool
) -> None:
    info = BuildInfo(torch=torch.__version__, cpu=(built,), why_no_native="")
    monkeypatch.setattr(_build, "info", lambda: info)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: runs)
    monkeypatch.setattr(_build.importlib, "import_module", lambda name: name)
    if loads:
        assert _build.extension() == "vaefast._C"
        return
    with pytest.raises(ImportError, match=f"for {built} alone .*, but here torch takes {runs}. Build it again"):
        _build.extension()


def test_flags_that_a_compiler_does_not_know_are_left_out(builder: ModuleType, tmp_path: Path) -> None:
    plain = builder.kernel_flags("AVX2")  # of the fixture's, which takes all
    assert [*builder.KERNEL_FLAGS, "-mavx2"] == plain[: len(builder.KERNEL_FLAGS) + 1]
    assert plain[-len(builder.GCC_FLAGS) :] == builder.GCC_FLAGS
    refuses = tmp_path / "clang++"
    refuses.write_text("#!/bin/sh\nexit 1\n")
    refuses.chmod(0o755)
    assert builder.kernel_flags("AVX2", str(refuses)) == plain[: -len(builder.GCC_FLAGS)]


def test_oldest_torch_is_the_declared_one(builder: ModuleType) -> None:
    oldest = ".".join(map(str, builder.OLDEST_TORCH))
    assert f'"torch>={oldest}"' in Path(ROOT, "pyproject.toml").read_text()


class Environment:
    """A virtual environment that holds what this one holds (less vaefast), or nothing but pip."""

    def __init__(self, folder: Path, *, torch: bool) -> None:
        self.folder, self.python = folder, folder / "bin" / "python"
        arguments = ["--without-pip"] if torch else []
        subprocess.run([sys.executable, "-m", "venv", *arguments, str(folder)], check=True)
        where = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
        self.packages = Path(subprocess.check_output([str(self.python), "-c", where], text=True).strip())
        if torch:
            ours = Path(sysconfig.get_paths()["purelib"])
            skip = shutil.ignore_patterns("*vaefast*", "__pycache__")
            shutil.copytree(ours, self.packages, copy_function=link, ignore=skip, dirs_exist_ok=True)
            # one ninja for all builds: another release cannot read what it has built, and builds again
            ninja = Path(sysconfig.get_paths()["scripts"], "ninja")
            if ninja.exists():
                link(str(ninja), str(folder / "bin" / "ninja"))

    def run(self, *command: object, fails: bool = False, **variables: str) -> str:
        """Output of the environment's Python, outside the source tree, with no VAEFAST_ variable but those given."""
        env = {k: v for k, v in os.environ.items() if not k.startswith(("VAEFAST_", "PYTHON", "CXX", "VIRTUAL_ENV"))}
        arguments = [str(self.python), *map(str, command)]
        done = subprocess.run(arguments, env=env | variables, cwd=self.folder, text=True, capture_output=True)
        assert (done.returncode != 0) is fails, done.stdout + done.stderr
        return done.stdout + done.stderr

    def install(self, source: Path, *options: str, fails: bool = False, **variables: str) -> str:
        again = ["--force-reinstall", "--no-deps"] if (self.packages / "vaefast").exists() else []
        return self.run("-m", "pip", "install", "-v", *again, *options, source, fails=fails, **variables)

    def config(self) -> str:
        return self.run("-c", "import vaefast; print(vaefast.available_backends(), vaefast.show_config())")


def link(source: str, destination: str) -> None:
    """Torch is a gigabyte, and pip replaces files without writing into them."""
    try:
        os.link(source, destination)
    except OSError:
        shutil.copy2(source, destination)


def wheel(env: Environment, source: Path, into: Path, **variables: str) -> list[str]:
    into.mkdir()
    env.run("-m", "pip", "wheel", "--no-deps", "-w", into, source, **variables)
    (path,) = into.glob("vaefast-*.whl")
    with zipfile.ZipFile(path) as archive:
        metadata = archive.read(next(n for n in archive.namelist() if n.endswith("METADATA"))).decode()
        return [path.name, *archive.namelist(), *re.findall(r"Requires-Dist: \S+", metadata)]


@pytest.mark.parametrize(
    ("found", "module"),
    [
        ("2.11.0", "vaefast.for_torch_2_11._C"),
        ("2.13.1+cu132", "vaefast.for_torch_2_13._C"),
        ("2.12.0", ""),
        ("2.13.0.dev1", ""),
    ],
)
def test_a_wheel_has_an_extension_for_each_torch(monkeypatch: pytest.MonkeyPatch, found: str, module: str) -> None:
    """Any build and patch of a release; nothing else, for which it says what to install."""
    monkeypatch.setattr(_build, "info", lambda: BuildInfo(torches=("2.11", "2.13"), cpu=("DEFAULT",), why_no_native=""))
    monkeypatch.setattr(torch, "__version__", found)
    monkeypatch.setattr(_build.importlib, "import_module", lambda name: name)
    assert _build.compiled()
    if module:
        assert _build.extension() == module
        return
    with pytest.raises(ImportError, match="kernels for torch 2.11, 2.13, but torch " + re.escape(found)) as refused:
        _build.extension()
    assert "'torch>=2.11,<2.14'" in str(refused.value)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, unpacked: every installation here shows that it holds all that a build needs."""
    folder = tmp_path_factory.mktemp("source")
    skip = shutil.ignore_patterns(".git", "build", "dist", "out", ".venv*", "*.so", "*.egg-info", ".*_cache")
    tree = shutil.copytree(ROOT, folder / "tree", ignore=skip)
    # what an editable install leaves in a checkout must not travel
    Path(tree, "vaefast", "_build_info.py").write_text("raise RuntimeError('stale')")
    make = f"import setuptools.build_meta as b; b.build_sdist({str(folder)!r})"
    subprocess.run([sys.executable, "-c", make], cwd=tree, check=True, capture_output=True)
    (archive,) = folder.glob("vaefast-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "sdist")
    (unpacked,) = (folder / "sdist").iterdir()
    return unpacked


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("env") / "venv", torch=True)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("bare") / "venv", torch=False)


def assert_native(env: Environment) -> None:
    config = env.config()
    assert "'cpu'" in config and f"torch {torch.__version__}" in config
    assert "cpu: built for DEFAULT" in config and re.search(r"(g|clang)\+\+ \d", config)
    assert "cuda: built with CUDA" in config or re.search("cuda: not built: .*; .*", config)


@pytest.mark.install
def test_sdist_holds_what_a_contributor_needs(source: Path) -> None:
    names = {str(path.relative_to(source)) for path in source.rglob("*")}
    assert {
        "csrc/ops.cpp",
        "csrc/cpu/kernels.cpp",
        "vaefast/py.typed",
        "vaefast/integrations/scvi.py",
        "LICENSE",
        "README.md",
        "Makefile",
    } <= names
    assert {"tests/test_install.py", "setup.py", "pyproject.toml", ".clang-format"} <= names
    assert "vaefast/_build_info.py" not in names


@pytest.mark.install
def test_plain_pip_install(env: Environment, source: Path) -> None:
    log = env.install(source)
    assert f"torch {torch.__version__}" in log and "vaefast: CPU kernels (DEFAULT" in log
    assert_native(env)


@pytest.mark.install
def test_instruction_sets_share_no_code(source: Path) -> None:
    """An inline function compiled twice is linked once: were it the AVX-512 one, an older CPU would die of it."""
    inline: dict[str, set[str]] = {}
    for unit in source.glob("build/*/**/*.o"):
        symbols = subprocess.check_output(["nm", "--defined-only", str(unit)], text=True)
        wide = re.search("AVX2|AVX512", str(unit.relative_to(source)))
        inline.setdefault(wide[0] if wide else "DEFAULT", set()).update(re.findall(r" [VWu] (\S+)", symbols))
    assert inline["DEFAULT"]
    for name in inline.keys() - {"DEFAULT"}:
        assert not inline[name] & inline["DEFAULT"], name
    assert not inline.get("AVX2", set()) & inline.get("AVX512", set())


@pytest.mark.install
def test_pip_install_without_isolation(env: Environment, source: Path) -> None:
    env.install(source, "--no-build-isolation")
    assert_native(env)


@pytest.mark.install
def test_editable_install_builds_in_place(env: Environment, source: Path) -> None:
    """What it leaves in the source tree must not reach the installations after it."""
    env.install(source, "--no-build-isolation", "-e")
    assert_native(env)
    assert list(Path(source, "vaefast").glob("_C.*.so")) and Path(source, "vaefast", "_build_info.py").exists()
    env.run("-m", "pip", "uninstall", "-y", "vaefast")


@pytest.fixture(scope="module")
def uv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uv")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    subprocess.run([str(folder / "bin" / "python"), "-m", "pip", "install", "-q", "uv"], check=True)
    return folder / "bin" / "uv"


@pytest.mark.install
def test_uv_pip_install_without_isolation(env: Environment, source: Path, uv: Path) -> None:
    command = [str(uv), "pip", "install", "--python", str(env.python), "--no-build-isolation", "--reinstall-package"]
    subprocess.run([*command, "vaefast", "."], cwd=source, check=True)
    assert_native(env)


@pytest.mark.install
def test_another_torch_is_refused_with_the_remedy(env: Environment, source: Path) -> None:
    env.install(source, "--no-build-isolation")
    # the recorded version is what is compared, so changing it is as good as changing torch
    record = env.packages / "vaefast" / "_build_info.py"
    record.write_text(record.read_text().replace(torch.__version__, "2.12.1+cpu"))
    shutil.rmtree(env.packages / "vaefast" / "__pycache__", ignore_errors=True)
    message = env.run("-c", "import vaefast", fails=True)
    assert "ImportError: vaefast was built against torch 2.12.1+cpu" in message
    assert "pip install --force-reinstall --no-deps" in message


@pytest.mark.install
def test_a_wheel_of_tools_wheel(env: Environment, source: Path, tmp_path: Path) -> None:
    """Here for one torch: installed where there is no compiler, it has the kernels, which need no symbol of torch's."""
    release = torch.__version__.partition("+")[0]
    make = ["-m", "tools.wheel", "--torches", release, "--out", tmp_path, "--no-audit"]
    env.run(*make, PYTHONPATH=str(source))
    (made,) = tmp_path.glob("vaefast-*.whl")
    assert not made.name.endswith("-none-any.whl")
    env.run("-m", "pip", "install", "--force-reinstall", "--no-deps", made)
    where = env.packages / "vaefast"
    assert "'cpu'" in env.config() and "cpu: built for DEFAULT, AVX2, AVX512" in env.config()
    assert not list(where.glob("_C*.so"))
    needed = subprocess.check_output(["objdump", "-p", str(where / "libvaefast_kernels.so")], text=True)
    assert not re.search(r"NEEDED +lib(torch|c10)", needed)
    code = "import torch, vaefast; x = torch.rand(4, 9); print(vaefast.elbo_loss(x, x, x, x).item())"
    assert float(env.run("-c", code, PATH="/nowhere")) > 0
    another = "import torch; torch.__version__ = '2.10.0'; import vaefast"
    assert "but torch 2.10.0 is installed" in env.run("-c", another, fails=True)


@pytest.mark.install
def test_without_torch_the_wheel_is_pure_python(bare: Environment, source: Path, tmp_path: Path) -> None:
    names = wheel(bare, source, tmp_path / "wheel")
    assert names[0].endswith("-py3-none-any.whl") and not any(name.endswith(".so") for name in names)
    assert "Requires-Dist: torch>=2.11" in names
    bare.install(source, "--no-deps")
    show = "import vaefast._build_info as b; print(b.BUILD['why_no_native'])"
    path = "import sys, types; sys.modules['vaefast'] = types.ModuleType('vaefast'); sys.modules['vaefast'].__path__ = "
    why = bare.run("-c", f"{path}[{str(bare.packages / 'vaefast')!r}]; {show}")
    assert "the build found no torch; install torch first" in why


@pytest.mark.install
def test_without_compiler_pure_python_works_and_says_why(env: Environment, source: Path) -> None:
    log = env.install(source, "--no-build-isolation", CXX="/nowhere/c++")
    assert "vaefast: pure Python, no kernels: CXX=/nowhere/c++ does not run; install g++" in log
    assert not list(Path(env.packages, "vaefast").glob("_C*.so"))
    config = env.config()
    assert "('reference',)" in config and "no compiled extension: CXX=/nowhere/c++ does not run" in config
    use = "import torch, vaefast as v; x = torch.randn(4, 3); print('kl', v.gaussian_kl(x, x) >= 0)"
    assert "kl tensor(True)" in env.run("-c", use)


@pytest.mark.install
def test_compiler_errors_are_errors_that_name_the_ways_out(env: Environment, source: Path, tmp_path: Path) -> None:
    tree = shutil.copytree(source, tmp_path / "tree", ignore=shutil.ignore_patterns("build"))
    Path(tree, "csrc", "cpu", "kernels.cpp").write_text("#error broken on purpose\n")
    log = env.install(tree, "--no-build-isolation", fails=True)
    assert "broken on purpose" in log and "vaefast: its kernels did not compile" in log
    assert "VAEFAST_FORCE_PYTHON=1" in log


@pytest.mark.install
def test_force_cuda_without_cuda_is_an_error_that_names_the_fix(env: Environment, source: Path) -> None:
    variables = {"VAEFAST_FORCE_CUDA": "1", "CUDA_HOME": "/nowhere", "MAX_JOBS": "1"}
    log = env.install(source, "--no-build-isolation", fails=True, **variables)
    assert re.search("VAEFAST_FORCE_CUDA was set, but .*; (install|take) ", log)
