"""pyproject.toml, constraints.txt and environment.yml say the same."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
# Commented out in environment.yml: they need a GPU or a compiler, or gigabytes for what few want.
SWITCHED_OFF = ("tensorrt", "gpu", "horovod", "litert-convert")


def name(requirement: str) -> str:
    return re.match(r"[A-Za-z0-9_.-]+", requirement).group().lower()


def names(*extras: str) -> set[str]:
    return {name(requirement) for extra in extras for requirement in EXTRAS[extra]}


def listed(prefix: str) -> set[str]:
    """Package names of environment.yml's pip section, those that lines with this prefix name."""
    lines = (ROOT / "environment.yml").read_text(encoding="utf-8").split("- pip:")[1].splitlines()
    found = [re.match(rf"\s+{re.escape(prefix)} ([A-Za-z0-9][^\s;]*)", line) for line in lines]
    return {match.group(1).lower() for match in found if match}


def test_environment_lists_what_the_project_needs_and_nothing_else():
    on = {name(requirement) for requirement in PROJECT["dependencies"]} | names(*EXTRAS.keys() - {"all", *SWITCHED_OFF})
    assert listed("-") == on
    assert listed("# -") == names(*SWITCHED_OFF)


def test_environment_pins_by_the_constraints_and_installs_the_checkout():
    text = (ROOT / "environment.yml").read_text(encoding="utf-8")
    assert "      - -c constraints.txt\n      - -e .\n" in text


def test_every_package_that_the_course_teaches_with_is_named_openly():
    taught = {"jupyterlab", "jupyter-book", "nbval", "torch", "torchvision", "fastapi", "uvicorn"}
    taught |= {"tensorrt", "pycuda", "horovod"}
    declared = {name(requirement) for requirement in PROJECT["dependencies"]} | names(*EXTRAS.keys())
    assert declared.issuperset(taught)
    assert (listed("-") | listed("# -")).issuperset(taught)


def test_all_is_everything_that_installs_without_a_gpu_or_a_compiler():
    (everything,) = EXTRAS["all"]
    assert set(re.search(r"\[(.*)\]", everything).group(1).split(",")) == EXTRAS.keys() - {
        "all",
        "gpu",
        "horovod",
        "litert-convert",
    }


def test_every_requirement_has_one_exact_version():
    pins = re.findall(r"(?m)^([A-Za-z0-9_.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"))
    pinned = {package.lower() for package, _ in pins}
    needed = {name(requirement) for requirement in PROJECT["dependencies"]} | names(
        *EXTRAS.keys() - {"all", "gpu", "litert-convert"}
    )
    assert needed - {"horovod"} <= pinned
    assert "horovod==0.28.1" in EXTRAS["horovod"]  # compiled by tools/build_horovod.py, which `make lock` cannot


def test_an_editable_install_needs_nothing_that_the_test_extra_does_not_bring():
    """So that `pip download` of the extras is enough for a machine without a network."""
    build_needs = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"]
    assert {name(requirement) for requirement in build_needs} | {"editables"} <= names("test")


def test_the_lock_names_no_machine_and_no_registry():
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert "://" not in text
    assert not re.search(r"(?m)\s/\w", text)
