"""What is installed from a wheel, without the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_wheel_brings_what_the_project_ships(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*build, "--wheel-dir", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("companion-*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    program = (
        "import companion; from companion.datasets import shipped, verify; "
        "print(companion.__file__, shipped('manifest.json')); assert all(check.ok for check in verify())"
    )
    path = os.pathsep.join([str(tmp_path / "installed"), os.environ["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    package, manifest = done.stdout.split()
    assert package == str(tmp_path / "installed" / "companion" / "__init__.py")
    assert manifest == str(tmp_path / "installed" / "companion" / "_data" / "manifest.json")
    assert Path(manifest).read_bytes() == (ROOT / "data" / "manifest.json").read_bytes()
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if name.startswith(("tests", "book", "notebooks", "tools"))]
