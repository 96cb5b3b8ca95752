"""`hf-ext` itself and `hf-ext env`."""

import importlib.metadata
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import hf_ext
from hf_ext.cli import _DOORS, app, main


HALLS = {name: hall.doors for name, hall in _DOORS.items() if hasattr(hall, "doors")}
COMMANDS = [(group, name) for group, doors in HALLS.items() for name in doors]


def invoke(*arguments: str):
    # A wide terminal, so that no word of the help is cut in two.
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"})


def test_env_prints_versions_and_hardware():
    result = invoke("env")
    assert result.exit_code == 0, result.output
    facts = dict(line.removeprefix("- ").split(": ", 1) for line in result.stdout.splitlines())
    assert facts["hf_ext"] == hf_ext.__version__
    for name in ("torch", "transformers", "peft", "huggingface_hub"):
        assert facts[name] == importlib.metadata.version(name)
    assert {"python", "device", "cpu count", "shipped models", "trl", "datasets", "accelerate"} <= set(facts)


def test_env_says_what_is_not_installed(monkeypatch):
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    result = invoke("env")
    assert result.exit_code == 0
    assert "- trl: not installed" in result.stdout


def test_help_lists_every_command_with_an_example():
    result = invoke("--help")
    assert result.exit_code == 0
    assert "Example" in result.stdout
    for name, door in _DOORS.items():
        assert name in result.stdout
        assert door.help in result.stdout


@pytest.mark.parametrize("command", [*((name,) for name in _DOORS), *COMMANDS], ids=" ".join)
def test_help_of_each_command_shows_an_example(command):
    result = invoke(*command, "--help")
    assert result.exit_code == 0, result.output
    assert "Example" in result.stdout


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_group_lists_what_its_commands_say_of_themselves(command):
    """The list is written without importing them."""
    group, name = command
    listed = HALLS[group][name].help
    assert listed in " ".join(invoke(*command, "--help").stdout.split())
    assert invoke(group, "--help").exit_code == 0


@pytest.mark.parametrize("arguments", [(), *((group,) for group in HALLS)])
def test_help_imports_no_command(arguments):
    code = (
        f"import sys; sys.argv = ['hf-ext', *{arguments}, '--help']\n"
        "from hf_ext.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print('loaded:', *(name for name in sys.modules if name in {'torch', 'transformers', 'peft', 'trl'}\n"
        "      or name.startswith('hf_ext.cli.')))\n"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
    ).stdout
    assert output.splitlines()[-1].strip() == "loaded:"


def test_unknown_command_suggests_the_nearest():
    result = invoke("envv")
    assert result.exit_code == 2
    assert "'env'" in result.output


def test_no_arguments_show_the_help():
    assert "Commands" in invoke().output


def test_version():
    result = invoke("--version")
    assert result.exit_code == 0
    assert result.stdout.strip() == hf_ext.__version__


def test_missing_extra_ends_with_the_line_that_installs_it(monkeypatch, capsys):
    def needs_trl() -> None:
        raise ModuleNotFoundError("No module named 'trl'", name="trl")

    monkeypatch.setattr("hf_ext.cli.env.env", needs_trl)
    monkeypatch.setattr(sys, "argv", ["hf-ext", "env"])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 1
    assert "pip install 'hf-ext[train]'" in capsys.readouterr().err


def test_other_errors_are_not_swallowed(monkeypatch):
    def fails() -> None:
        raise ValueError("something else")

    monkeypatch.setattr("hf_ext.cli.env.env", fails)
    monkeypatch.setattr(sys, "argv", ["hf-ext", "env"])
    with pytest.raises(ValueError, match="something else"):
        main()
