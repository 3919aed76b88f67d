"""The map from the paper to the code, and every command and flag that the documents name, checked against the code itself."""
import ast
import importlib
import json
import os
import re
import shlex
import subprocess
import time
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from pretrain import parse

ROOT = Path(__file__).resolve().parent.parent
MAP, *OTHERS = [(ROOT / name).read_text() for name in (
    "docs/paper-map.md", "README.md", "docs/results.md", "docs/performance.md", "docs/gpu.md")]
STAGES = [importlib.import_module(name) for name in ("pretrain", "sft", "reward", "rlhf", "gatt", "eval")]
SECTIONS = ("1 2 2.1 2.2 2.2.1 2.3 3 3.1 3.2 3.2.1 3.2.2 3.2.3 3.3 3.4 3.4.1 3.4.2 4 4.1 4.2 4.2.1 4.2.2 4.2.3 4.2.4 4.3 4.4 "
            "5 5.1 5.2 5.3 6 7 A.1 A.2 A.2.1 A.2.2 A.3 A.3.1 A.3.2 A.3.3 A.3.4 A.3.5 A.3.6 A.3.7 A.4 A.4.1 A.4.2 A.4.3 A.4.4 "
            "A.4.5 A.4.6 A.4.7 A.4.8 A.5 A.5.1 A.5.2 A.5.3 A.5.4 A.6 A.7").split()  # the paper's table of contents


class Row(NamedTuple):
    """A line of the map; a cell without anything to say holds a dash."""
    item: str
    code: str
    command: str
    ours: str
    paper: str


LINES = [re.split(r"(?<!\\)\|", line)[1:-1] for line in MAP.split("\n") if line.startswith("| ")]
ROWS = [Row(*map(str.strip, cells)) for cells in LINES if cells[0] != " in the paper "]


def spans(text: str) -> list[str]:
    """What stands between backticks."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text.replace("\\|", "|"))]


@cache
def tree_of(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text())


@cache
def names_in(file: str) -> set[str]:
    """Functions, classes and constants of a file, and Class.name of what a class holds."""
    inside = {node: f"{outer.name}." for outer in tree_of(file).body if isinstance(outer, ast.ClassDef) for node in outer.body}
    found = set()
    for node, prefix in [*((node, "") for node in tree_of(file).body), *inside.items()]:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(prefix + node.name)
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        found |= {prefix + target.id for target in targets if isinstance(target, ast.Name)}
    return found


# ---------------------------------------------------------------------------------------------- the map


def test_every_section_equation_table_and_figure_of_the_paper_is_in_the_map():
    found = {re.match(r"§?(A\.)?\d+(\.\d+)*|(Table|Figure|Eq\.) \d+", row.item)[0].removeprefix("§") for row in ROWS}
    numbered = {f"{kind} {i}" for kind, n in (("Table", 52), ("Figure", 33), ("Eq.", 4)) for i in range(1, n + 1)}
    assert found == numbered | set(SECTIONS)


@pytest.mark.parametrize("row", ROWS, ids=[row.item for row in ROWS])
def test_a_row_names_code_that_exists_or_says_why_there_is_none(row):
    file, missing = "", []
    for name in spans(row.code):
        if (ROOT / name).is_file():
            file = name
        elif not file.endswith(".py") or name not in names_in(file):
            missing.append(f"{file} {name}")
    assert not missing
    assert file or re.match(r"not reproduced: \w", row.code)


@pytest.mark.parametrize("row", [row for row in ROWS if row.ours != "—"], ids=lambda row: row.item)
def test_our_figures_are_those_of_the_other_documents(row):
    plain = [" ".join(text.replace("**", "").replace("|", " ").split()) for text in OTHERS]
    for part in row.ours.split("; "):
        figure = re.escape(part.split(": ")[-1])
        assert re.search(r"\d", figure) and any(re.search(rf"(?<![\d.]){figure}(?!\d)", text) for text in plain), part


# ---------------------------------------------------------------------------------------------- commands


def code_of(text: str) -> list[str]:
    """The shell code of a document: the lines of its bash blocks, with the first value of each loop, and all in backticks."""
    code = []
    for block in re.findall(r"```bash\n(.*?)```", text, re.S):
        for name, values in re.findall(r"for (\w+) in ([^;]+);", block):
            block = re.sub(rf"\${name}\b", values.split()[0], block)
        code += block.replace("\\\n", " ").split("\n")
    return code + spans(re.sub(r"```.*?```", "", text, flags=re.S))


def commands_of(code: str) -> Iterator[tuple[str, ...]]:
    """The words of each simple command that names a file of ours, from `python` or `torchrun` on if there is one of them."""
    lexer = shlex.shlex(code, posix=True, punctuation_chars=";&")
    lexer.whitespace_split = True
    groups: list[list[str]] = [[]]
    for word in lexer if ".py" in code else ():
        if word in (";", "&&", "|"):
            groups.append([])
        else:
            groups[-1].append(word.split("|")[0])  # of a choice like a|b|c the first
    for words in groups:
        start = [i for i, word in enumerate(words) if word in ("python", "torchrun") or word.endswith(".py")]
        if any(word.endswith(".py") for word in words):
            yield tuple(words[start[0] :])


CODE = [code for text in (MAP, *OTHERS) for code in code_of(text)]
COMMANDS = list(dict.fromkeys(command for code in CODE for command in commands_of(code)))


@cache
def strings_in(file: str) -> set[str]:
    """The strings of a file, among them the flags and subcommands of its argument parser."""
    return {node.value for node in ast.walk(tree_of(file)) if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def check(command: tuple[str, ...]) -> None:
    """The script, its subcommand, its flags and their values exist."""
    at = next(i for i, word in enumerate(command) if word.endswith(".py"))
    script, arguments = command[at], list(command[at + 1 :])
    assert (ROOT / script).is_file()
    flags = {word for word in arguments if word.startswith("--")} - {"--help"}
    module = next((stage for stage in STAGES if f"{stage.__name__}.py" == script), None)
    if not module:
        assert flags | set(arguments[:1]) <= strings_in(script)
    elif at or arguments:  # a bare name is no command
        has_name = bool(arguments) and arguments[0] in module.COMMANDS
        settings = module.COMMANDS[arguments.pop(0)][1] if has_name else module.Settings
        names = {field.name for field in fields(settings)}
        assert {flag.removeprefix("--").removeprefix("no-") for flag in flags} <= names
        if at and "--help" not in arguments:  # the values too
            parse(settings, arguments + ["--preset", "toy"] * ("preset" in names and "--preset" not in arguments))


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_in_the_documents_names_a_script_a_subcommand_and_flags_that_exist(command):
    check(command)


def run_paper(folder: Path, python: str, *arguments: str) -> tuple[int, list[dict]]:
    """paper.sh with another program in place of Python: its exit code, and the stages that it noted."""
    result = subprocess.run(["bash", ROOT / "paper.sh", *arguments], env=os.environ | {"PYTHON": python, "RUNS": str(folder)},
                            capture_output=True)
    return result.returncode, [json.loads(line) for line in (folder / "out" / "stages.jsonl").read_text().splitlines()]


def test_every_stage_of_the_whole_paper_exists_and_none_that_is_done_is_run_again(tmp_path):
    code, stages = run_paper(tmp_path, "true", "full")
    assert code == 0 and len(stages) > 100
    for stage in stages:
        check(("python", *stage["command"].split()))
    made = {word for stage in stages for word in re.findall(r"out/[\w.-]+", stage["command"])}
    assert len({stage["command"] for stage in stages}) == len(stages) and "out/rlhf-v5-ppo" in made
    assert run_paper(tmp_path, "false", "full")[1] == stages  # it had nothing to run but the report


def test_a_stage_that_fails_stops_the_whole_and_comes_first_when_it_goes_on(tmp_path):
    code, stages = run_paper(tmp_path, "false")
    assert code == 1 and [stage["rc"] for stage in stages] == [1]
    assert run_paper(tmp_path, "true")[1][1]["command"] == stages[0]["command"]


def is_gone(pid: int) -> bool:
    """Whether a process ends within some seconds."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_a_kill_stops_the_stage_too_and_says_how_to_go_on(tmp_path):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/bash\necho $$ > {tmp_path}/pid; exec sleep 60")
    python.chmod(0o755)
    script = subprocess.Popen(["bash", ROOT / "paper.sh"], env=os.environ | {"PYTHON": str(python), "RUNS": str(tmp_path)},
                              stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.05)
    script.terminate()
    said = script.communicate(timeout=30)[1]
    assert script.returncode == 130 and f'go on with: RUNS={tmp_path} PYTHON="{python}" bash paper.sh' in said
    assert is_gone(int((tmp_path / "pid").read_text())) and not (tmp_path / "out" / "stages.jsonl").read_text()


def test_of_two_lanes_the_one_that_fails_stops_the_other_and_nothing_runs_on(tmp_path):
    python = tmp_path / "python"
    python.write_text(f"""#!/bin/bash
        case "$*" in
            *--kind*helpfulness*) for i in {{1..200}}; do [ -s {tmp_path}/pid ] && exit 3; sleep 0.05; done;;
            *--kind*safety*) echo $$ > {tmp_path}/pid; exec sleep 60;;
        esac""")
    python.chmod(0o755)
    code, stages = run_paper(tmp_path, str(python))
    assert code == 1 and stages[-1] | {"seconds": 0} == {
        "command": "reward.py --kind helpfulness", "rc": 3, "seconds": 0, "lanes": 2}
    assert is_gone(int((tmp_path / "pid").read_text()))
    python.write_text(python.read_text().replace("exit 3", "exit 0").replace("exec sleep 60", "echo it broke; exit 4"))
    result = subprocess.run(["bash", ROOT / "paper.sh"], env=os.environ | {"PYTHON": str(python), "RUNS": str(tmp_path)},
                            capture_output=True, text=True)
    assert result.returncode == 1 and "it broke\nreward.py --kind safety stopped; go on with: " in result.stdout
    lines = (tmp_path / "out" / "stages.jsonl").read_text().splitlines()[-2:]
    assert sorted(json.loads(line)["rc"] for line in lines) == [0, 4]


def test_every_flag_that_the_documents_name_alone_exists():
    known = {field.name for stage in STAGES for cls in vars(stage).values() if is_dataclass(cls) for field in fields(cls)}
    named = {flag for code in CODE if code.startswith("--") for flag in re.findall(r"--(?:no-)?(\w+)", code)}
    named -= {"nnodes"}  # torchrun's
    assert named and named <= known
