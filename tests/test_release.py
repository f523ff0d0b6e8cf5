"""What a release holds beside code: it agrees with itself, and asks and promises what it should."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tomllib

import pytest
import yaml

from ringattn.cli import info
from ringattn.cli import main as cli

from .processes import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"tools/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_version_changelog_and_citation_agree(tmp_path, monkeypatch, capsys):
    release = tool("release")
    assert release.disagreements(PROJECT["version"]) == []
    assert release.notes(PROJECT["version"]) in (ROOT / "CHANGELOG.md").read_text()
    for name in ("pyproject.toml", "CITATION.cff", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tmp_path)
    lines = release.disagreements("9.9.9", tmp_path)
    assert len(lines) == 3 and all(name in " ".join(lines) for name in
                                   ("pyproject.toml", "CITATION.cff", "CHANGELOG.md"))  # fmt: skip
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    wanted = {"cff-version", "message", "title", "authors", "version", "date-released", "license"}
    assert wanted <= cited.keys() and cited["license"] == PROJECT["license"]


def test_the_readme_of_a_package_leads_to_the_files_of_its_release():
    files = "https://host/owner/name/blob/v1"
    given = (ROOT / "README.md").read_text()
    page = tool("release").addressed(given, files)
    links = re.findall(r"\]\(([^)]*)\)", page)
    assert len(links) > 20 and all(x.startswith(f"{files}/") for x in links)
    for link in links:
        assert (ROOT / re.split("[?#]", link.removeprefix(f"{files}/"))[0]).exists(), link
    assert f"]({files}/docs/ring.png?raw=true)" in page and "[start here](" in page
    assert tool("release").addressed(page, "again") == page


def test_info_says_what_a_fault_depends_on_and_nothing_else(capsys, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "secret-key")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert cli(["info", "--json"]) == 0
    shown = capsys.readouterr().out
    facts = json.loads(shown)
    assert facts["versions"]["ringattn"] == PROJECT["version"]
    assert facts["versions"]["torch"] and "cpu" in facts["devices"]
    assert "gloo" in facts["links"]["backends"] and facts["links"]["calibrated"]
    assert "aten" in facts["kernels for kernel=auto"]["bfloat16"]
    assert facts["environment"]["OMP_NUM_THREADS"] == "3" and "secret-key" not in shown
    assert cli(["info"]) == 0
    text = capsys.readouterr().out
    assert all(f"{title}:" in text for title in facts)


def test_info_shows_the_links_of_a_calibrated_machine(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "ringattn").mkdir()
    shutil.copy(ROOT / "configs/machines/h100.yaml", tmp_path / "ringattn/this.yaml")
    assert cli(["info", "--json"]) == 0
    links = json.loads(capsys.readouterr().out)["links"]
    assert re.match(r"[\d.]+ GB/s in exchanges of 64 MiB, [\d.]+ us", links["intra_node"])
    assert "inter_node" in links and info.here() == tmp_path / "ringattn/this.yaml"


def test_issue_templates_ask_for_the_output_of_info():
    templates = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
    assert len(templates) >= 3
    for path in templates:
        form = yaml.safe_load(path.read_text())
        if path.name == "config.yml":
            continue
        required = [x for x in form["body"] if (x.get("validations") or {}).get("required")]
        labels = [x["attributes"]["label"] for x in required]
        assert any("ringattn info" in label for label in labels), path


def test_workflows_call_what_is_there():
    """Every make target and every script of a workflow exists, and publishing wants the tests."""
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in (ROOT / ".github/workflows").glob("*.yml"):
        jobs = yaml.safe_load(path.read_text())["jobs"]
        for step in (step for job in jobs.values() for step in job["steps"]):
            command = step.get("run", "")
            assert {*re.findall(r"make (\w+)", command)} <= targets
            for script in re.findall(r"python (\S+\.py)", command):
                assert (ROOT / script).exists()
    release = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())
    assert release["jobs"]["publish"]["needs"] == "build"
    assert ".ci/run" in [step.get("run") for step in release["jobs"]["build"]["steps"]]


def test_the_licence_list_has_every_requirement():
    page = (ROOT / "docs/licences.md").read_text()
    listed = set(re.findall(r"^\| ([\w.-]+) \|", page, re.MULTILINE))
    extras = PROJECT["optional-dependencies"]
    needed = [*PROJECT["dependencies"], *(x for name in extras if name != "bench"
                                         for x in extras[name])]  # fmt: skip
    names = {re.match(r"[\w.-]+", text)[0].lower().replace("_", "-") for text in needed}
    assert names - {"ringattn"} <= listed, names - listed
    assert "not said" not in page


@pytest.mark.skipif(not shutil.which("hadolint"), reason="no hadolint on the path")
def test_the_dockerfile_is_linted():
    done = subprocess.run(["hadolint", ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_dockerfile_copies_what_is_there_and_gives_up_root():
    text = (ROOT / "Dockerfile").read_text()
    kept = (ROOT / ".dockerignore").read_text()
    for line in re.findall(r"^COPY (?!--from)(?:--chown=\w+ )?(.*) \S+$", text, re.MULTILINE):
        for name in line.split():
            assert (ROOT / name).exists() and f"!{name}" in kept, name
    assert re.search(r"^USER 1000$", text, re.MULTILINE)
    extras = re.search(r"'\.\[(.*)\]'", text)[1].split(",")
    assert {*extras} <= PROJECT["optional-dependencies"].keys()


def test_the_oldest_set_is_what_the_core_says_at_least():
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints-oldest.txt").read_text(),
                           re.MULTILINE))  # fmt: skip
    pins = {name.lower(): version for name, version in pins.items()}
    for text in PROJECT["dependencies"]:
        name, least = re.match(r"([\w-]+)>=([\d.]+)", text).groups()
        assert (pins[name] + ".0").startswith(least), (name, pins[name], least)
    assert sys.version_info >= (3, 11)


def test_types_are_for_users_too():
    assert (ROOT / "ringattn/py.typed").exists()
    packed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "py.typed" in packed["package-data"]["ringattn"]


def test_the_readme_counts_the_builders_of_masks():
    from ringattn.planning.masks import BUILDERS

    assert f"[{len(BUILDERS)} builders]" in (ROOT / "README.md").read_text()
