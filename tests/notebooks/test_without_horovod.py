"""The notebook of 2.2.3 where Horovod is not built: the same trainings over DDP, and the outputs that are compared."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NBVAL = ["--nbval", "--nbval-current-env", "--nbval-cell-timeout", "300", "-o", "filterwarnings="]


@pytest.mark.stress
@pytest.mark.timeout(600)
def test_ddp_takes_the_place_of_horovod(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nimport no_network\nsys.modules['horovod'] = None\n")
    path = os.pathsep.join(map(str, (tmp_path, ROOT / "tests" / "offline")))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *NBVAL, ROOT / "notebooks" / "2_2_3_horovod.ipynb"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path, "TQDM_DISABLE": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
