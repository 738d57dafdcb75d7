"""The documentation is true: commands run, Python runs, configurations are valid, links resolve, keys are complete.

Info strings of fences: `console` and `python run` blocks run in one directory per document, in order, after the files
of the blocks marked `file=NAME` are written there. `needs=a,b` names what this machine may lack: `embedded` blocks run
where PROCTOR_TEST_GGUF says that the model is here; of the others, verbs and options are checked.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
import yaml

from proctor.cli import cli
from proctor.config.clusters.files import load_profiles
from proctor.config.schema import json_schema
from proctor.config.spec import RunSpec

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "design").glob("*.md"))]
GGUF = os.environ.get("PROCTOR_TEST_GGUF")
KNOWN_NEEDS = {"embedded", "lm-eval", "vllm", "weights", "checkout", "slurm"}

each = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))


@dataclass(frozen=True)
class Fence:
    language: str
    words: tuple[str, ...]
    text: str

    @property
    def needs(self) -> set[str]:
        found = [w.removeprefix("needs=") for w in self.words if w.startswith("needs=")]
        return set(found[0].split(",")) if found else set()

    @property
    def file(self) -> str | None:
        return next((w.removeprefix("file=") for w in self.words if w.startswith("file=")), None)

    @property
    def commands(self) -> list[list[str]]:
        lines = [line for line in self.text.splitlines() if line.startswith("$ ")] if self.language == "console" else []
        return [shlex.split(line[2:], comments=True) for line in lines]


def fences(document: Path) -> list[Fence]:
    found = re.findall(r"^```(\S*)([^\n]*)\n(.*?)^```$", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [Fence(language, tuple(info.split()), text) for language, info, text in found]


def runnable(fence: Fence) -> bool:
    if fence.language == "python" and "run" not in fence.words:
        return False
    return fence.language in ("console", "python") and fence.needs <= ({"embedded"} if GGUF else set())


# --- what is shown runs ---

SHOWN = [d for d in DOCUMENTS if any(f.language in ("console", "python") for f in fences(d))]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("document", SHOWN, ids=lambda p: p.stem)
def test_what_is_shown_runs(document: Path, tmp_path: Path, own_cache: Path) -> None:
    if GGUF:
        there = own_cache / "models" / Path(GGUF).parent.name
        there.parent.mkdir(parents=True, exist_ok=True)
        there.symlink_to(Path(GGUF).parent)
    everything = fences(document)
    for fence in everything:
        if fence.file is not None:
            path = tmp_path / fence.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(fence.text, encoding="utf-8")
    for fence in filter(runnable, everything):
        if fence.language == "python":
            run([sys.executable, "-W", "error", "-c", fence.text], tmp_path)
        for command in fence.commands:
            assert command[0] == "proctor", f"{command} needs something: say so in the info string"
            run([sys.executable, "-m", "proctor", *command[1:]], tmp_path)


def run(argv: list[str], directory: Path) -> None:
    done = subprocess.run(argv, cwd=directory, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, f"{argv}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr


@each
def test_every_command_has_its_verbs_and_options(document: Path) -> None:
    group: click.Group = cli
    context = click.Context(group)
    for fence in fences(document):
        assert fence.needs <= KNOWN_NEEDS
        for argv in fence.commands:
            if argv[0] == "make":
                targets = (ROOT / "Makefile").read_text()
                assert all(re.search(rf"^{target}:", targets, re.MULTILINE) for target in argv[1:]), argv
            if argv[0] != "proctor":
                continue
            verb = group.get_command(context, argv[1])
            assert verb is not None, argv
            verb.make_context(argv[1], argv[2:], resilient_parsing=False)


# --- configurations ---

STAND_INS: dict[str, object] = {"name": "x", "models": {"m": {"path": "/m"}}, "tasks": [{"native": "demo:opposites"}]}


@each
def test_configurations_are_valid(document: Path, tmp_path: Path) -> None:
    for fence in fences(document):
        if fence.language != "yaml":
            continue
        if "clusters" in fence.words:
            (tmp_path / "clusters.yaml").write_text(fence.text, encoding="utf-8")
            load_profiles([tmp_path / "clusters.yaml"], {})
            continue
        value = yaml.safe_load(fence.text)
        if "task" in value:
            continue  # a task file; what is shown with file= is run
        RunSpec.model_validate(STAND_INS | value)


def documented() -> dict[str, dict[str, str]]:
    """Definition → key → default, as the tables of configuration.md have it."""
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    found: dict[str, dict[str, str]] = {}
    for names, table in re.findall(r"<!-- schema: ([\w ]+) -->\n\n((?:\|.*\n)+)", text):
        for row in table.splitlines()[2:]:
            key, default, *_ = [cell.strip() for cell in row.strip("|").split("|")]
            for name in names.split():
                assert key.strip("`") not in found.setdefault(name, {}), f"{name}.{key} stands there twice"
                found[name][key.strip("`")] = default
    return found


def schema_keys() -> dict[str, dict[str, dict[str, object]]]:
    schema = json_schema()
    return {"RunSpec": schema["properties"]} | {name: d["properties"] for name, d in schema["$defs"].items()}


def test_every_key_is_documented_and_every_documented_key_exists() -> None:
    shown = {name: set(keys) for name, keys in documented().items()}
    assert shown == {name: set(keys) for name, keys in schema_keys().items()}


def test_documented_defaults_are_the_schema_s() -> None:
    for name, keys in schema_keys().items():
        for key, field in keys.items():
            shown = documented()[name][key]
            if "default" in field:
                value = yaml.safe_load(shown.strip("`"))
                assert (str(value) if key == "template_date" else value) == field["default"], f"{name}.{key}"
            else:
                assert shown in ("required", "-", "`{type: openai}`", "`{type: local}`"), f"{name}.{key}: {shown}"
            if shown == "required":
                assert field.get("default") is None


# --- messages ---


def test_quoted_messages_are_the_program_s() -> None:
    source = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "src").rglob("*.py"))
    rows = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").split("|---|---|---|\n")[1].splitlines()
    quoted = [q for row in rows if row.startswith("|") for q in re.findall(r"`([^`]+)`", row.split("|")[1])]
    assert quoted
    for part in (part for q in quoted for part in q.split(" ... ")):
        assert part in source, f"no message says {part!r}"


# --- links ---


def anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@each
def test_links_resolve(document: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+://", target):
            continue
        path, _, fragment = target.partition("#")
        there = (document.parent / path).resolve() if path else document
        assert there.exists(), f"{document.name}: {target}"
        assert there.is_relative_to(ROOT)
        if fragment:
            headings = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            assert fragment in {anchor(h) for h in headings}, f"{document.name}: {target}"


def test_the_readme_leads_to_every_document() -> None:
    linked = set(re.findall(r"\]\((docs/[^)#]+)", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert linked == {f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")}
