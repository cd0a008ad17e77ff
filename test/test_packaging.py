"""The wheels, installed: a kernel whose source is not in them compiles only where a checkout, or a full cache, is in reach.

Everything here runs from an empty folder and an empty cache, in a virtual environment that has PyTorch and no checkout.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "torch_jit_ops", "csrc", "include")


def files(folder: Path) -> set[str]:
    """Names of all files below a folder, but what Python and setuptools leave behind."""
    found = (file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    return {str(file) for file in found if "__pycache__" not in file.parts and not file.parts[0].endswith(".egg-info")}


def build_wheel(source: Path, folder: Path) -> Path:
    """Through a source distribution, so that this is complete too. ``source`` is a copy: setuptools writes into it."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source)]
    done = subprocess.run(command, cwd=folder.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob(f"{source.name}-*.whl")
    return wheel


@dataclass(frozen=True)
class Installed:
    """A virtual environment with the wheels of ``torch_jit_ops`` and of the example ``mylib``."""

    wheel: Path
    user_wheel: Path
    home: Path
    cache: Path
    folder: Path

    def run(self, *command: str, **variables: str) -> str:
        """What Python prints in that environment, with these variables set."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        environment |= {"JITK_CACHE_DIR": str(self.cache), "JITK_FALLBACK": "error", "JITK_VERBOSE": "1", **variables}
        python = [str(self.home / "bin/python"), *command]
        done = subprocess.run(python, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
        return done.stdout


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    root = tmp_path_factory.mktemp("packaging")
    root.chmod(0o700)  # or the cache in it could be written by others
    source, user_source = root / "torch_jit_ops", root / "mylib"
    source.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    shutil.copytree(ROOT / "examples/mylib", user_source)
    (root / "dist").mkdir()
    wheel, user_wheel = (build_wheel(place, root / "dist") for place in (source, user_source))

    home = root / "venv"
    venv.create(home, with_pip=True, symlinks=True)
    (site,) = home.glob("lib/python*/site-packages")
    # As lines of a .pth file these give PyTorch, but not the editable installs that they hold.
    reachable = [entry for entry in sys.path if re.search(r"(site|dist)-packages/?$", entry)]
    (site / "pytorch.pth").write_text("\n".join(dict.fromkeys([*reachable, str(Path(torch.__file__).parents[1])])))
    install = [str(home / "bin/python"), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, str(wheel), str(user_wheel)], check=True, cwd=root)
    shutil.rmtree(source)
    shutil.rmtree(user_source)
    for name in ("cache", "empty"):
        (root / name).mkdir(mode=0o700)
    return Installed(wheel, user_wheel, home, root / "cache", root / "empty")


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_one_wheel_serves_every_pytorch_and_gpu(installed: Installed) -> None:
    assert installed.wheel.name.endswith("-py3-none-any.whl")


def test_the_wheel_holds_every_source_and_nothing_else(installed: Installed) -> None:
    expected = {f"torch_jit_ops/{name}" for name in files(ROOT / "torch_jit_ops")}
    for folder in ("csrc", "include"):
        expected |= {f"torch_jit_ops/{folder}/{name}" for name in files(ROOT / folder)}
    assert contents(installed.wheel) == expected


def test_the_users_wheel_holds_every_source(installed: Installed) -> None:
    assert contents(installed.user_wheel) == {f"mylib/{name}" for name in files(ROOT / "examples/mylib/mylib")}


def test_an_op_compiles_from_the_wheel_alone(installed: Installed) -> None:
    program = """if True:
        import torch, torch_jit_ops
        from torch_jit_ops.builder.unit import csrc_dir, include_dir
        print(torch_jit_ops.__file__, csrc_dir(), include_dir(), sep="\\n")
        x = torch.randn(5, 2 * 301)
        gate, up = x.chunk(2, -1)
        torch.testing.assert_close(torch.ops.jitk.silu_and_mul(x), torch.nn.functional.silu(gate) * up)
    """
    places = installed.run("-c", program).splitlines()
    assert [str(Path(place).relative_to(installed.home)).split("site-packages/")[1] for place in places] == [
        "torch_jit_ops/__init__.py",
        "torch_jit_ops/csrc",
        "torch_jit_ops/include",
    ]
    assert len(list(installed.cache.glob("jitk.silu_and_mul-*/*/variant.json"))) == 1


def test_the_list(installed: Installed) -> None:
    assert "silu_and_mul" in installed.run("-m", "torch_jit_ops", "list")


def test_the_console_script(installed: Installed) -> None:
    script = [str(installed.home / "bin/torch-jit-ops"), "list", "silu_*"]
    done = subprocess.run(script, cwd=installed.folder, capture_output=True, text=True, check=True)
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["jitk::silu_and_mul", "jitk::silu_mul"]


def test_the_demo(installed: Installed) -> None:
    """Without Inductor, which takes half a minute and reads nothing of ours."""
    command = ("-m", "torch_jit_ops", "demo", "--device", "cpu", "--tokens", "16")
    printed = installed.run(*command, TORCHDYNAMO_DISABLE="1")
    assert printed.splitlines()[-1] == "all agree: no error is above twice that of plain PyTorch"


def test_a_users_library_compiles_from_its_wheel(installed: Installed) -> None:
    """Its own sources, its own header, a second namespace."""
    program = """if True:
        import mylib, torch
        print(mylib.__file__)
        x, scale, shift = torch.randn(7, 96), torch.randn(3), torch.randn(3)
        expected = x * scale.repeat_interleave(32) + shift.repeat_interleave(32)
        result = torch.ops.mylib.scale_shift(x, scale, shift, group=32)
        torch.testing.assert_close(result, expected)
        out = torch.full_like(x, torch.nan)
        torch.ops.mylib.scale_shift.out(x, scale, shift, 32, out=out)
        assert torch.equal(out, result)

        @torch.compile(fullgraph=True, backend="aot_eager")  # Inductor reads nothing of ours, and takes its time
        def compiled(x):
            return torch.ops.mylib.scale_shift(x.sin(), scale, None, group=32) + 1

        torch.testing.assert_close(compiled(x), x.sin() * scale.repeat_interleave(32) + 1)
        torch.library.opcheck(mylib.scale_shift.default, (x, scale, shift, 32))
    """
    (place,) = installed.run("-c", program).splitlines()
    assert installed.home in Path(place).parents
    assert len(list(installed.cache.glob("mylib.scale_shift-*/*/variant.json"))) == 1
