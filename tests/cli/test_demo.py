import json
import subprocess
import sys

import pytest
from rich.console import Console
from typer.testing import CliRunner

from hf_ext.cli import app, demo_dynamoe
from hf_ext.cli.compare import MethodResult
from hf_ext.cli.demo import SECTIONS, run
from hf_ext.cli.demo_mtp import COLUMNS, results_table, verdict
from hf_ext.cli.demo_options import PROMPTS, DemoOptions
from hf_ext.cli.report import Section


def invoke(*arguments):
    return CliRunner().invoke(app, ["demo", *map(str, arguments)], env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"})


@pytest.fixture
def small(base_folder, adapter_folder, tmp_path):
    """Arguments of a demonstration that takes a second."""
    return (
        *("--model", base_folder, "--adapter", adapter_folder, "--device", "cpu"),
        *("--num-prompts", 2, "--max-new-tokens", 10, "--repeats", 1, "--output-dir", tmp_path / "demo"),
        *("--training-steps", 0, "--no-speech"),
    )


def result(name="plain", **changes):
    values = {
        "num_prompts": 8,
        "num_tokens": 80,
        "num_steps": 80,
        "seconds": 1.0,
        "tokens_per_step": 1.0,
        "tokens_per_second": 80.0,
        "speedup": 1.0,
        "num_identical": 8,
        "distinct_4grams": 0.9,
        "runs": [],
    }
    return MethodResult(name, **{**values, **changes})


class TestCommand:
    def test_prints_the_table_and_writes_page_picture_and_figures(self, small, tmp_path):
        pytest.importorskip("matplotlib")
        outcome = invoke(*small)
        assert outcome.exit_code == 0, outcome.output
        for method in (
            "plain",
            "prompt lookup",
            "multi-token linear, k=3",
            "multi-token adaptive, k=3",
            "multi-token quadratic, k=3",
        ):
            assert method in outcome.stdout
        assert outcome.stdout.count("2 of 2") == 5
        for word in ("tokens", "seconds", "speed-up", "identical", "4-grams", "Prompt 1"):
            assert word in outcome.stdout

        page = (tmp_path / "demo" / "index.html").read_text()
        assert PROMPTS[0] in page
        assert PROMPTS[2] not in page
        assert (tmp_path / "demo" / "mtp.png").read_bytes().startswith(b"\x89PNG")
        figures = json.loads((tmp_path / "demo" / "results.json").read_text())
        assert figures["machine"]["dtype"] == "float32"
        assert [method["num_identical"] for method in figures["mtp"]["methods"]] == [2] * 5

    def test_a_page_that_is_passed_on_shows_no_paths(self, small, tmp_path, base_folder):
        invoke(*small)
        for name in ("index.html", "results.json"):
            assert str(base_folder.parent) not in (tmp_path / "demo" / name).read_text()

    def test_own_prompts_and_number_of_guesses(self, small, tmp_path):
        outcome = invoke(*small, "--prompt", "one <1>", "--prompt", "two", "--prompt", "three", "--k", 2)
        assert outcome.exit_code == 0, outcome.output
        assert outcome.stdout.count("3 of 3") == 5
        assert "multi-token linear, k=2" in outcome.stdout
        assert "one &lt;1&gt;" in (tmp_path / "demo" / "index.html").read_text()

    def test_a_draft_model_adds_assisted_decoding(self, small, base_folder):
        outcome = invoke(*small, "--draft-model", base_folder)
        assert outcome.exit_code == 0, outcome.output
        assert "assisted" in outcome.stdout
        assert outcome.stdout.count("2 of 2") == 6

    def test_an_adapter_alone_names_its_base(self, small, adapter_folder):
        arguments = small[4:]
        assert invoke("--model", adapter_folder, *arguments).exit_code == 0
        assert invoke("--adapter", adapter_folder, *arguments).exit_code == 0

    def test_the_page_is_opened_on_request_only(self, small, monkeypatch):
        opened = []
        monkeypatch.setattr("webbrowser.open", opened.append)
        invoke(*small)
        assert opened == []
        invoke(*small, "--open")
        assert [address.rsplit("/", 1)[1] for address in opened] == ["index.html"]


class TestNestedExperts:
    @pytest.fixture(autouse=True)
    def _fast(self, monkeypatch):
        pytest.importorskip("matplotlib")
        pytest.importorskip("trl")
        monkeypatch.setattr(demo_dynamoe, "_WIDE", (64, 128, 1))
        monkeypatch.setattr(demo_dynamoe, "_NUM_TEST", 4)

    def test_a_model_is_converted_trained_and_shown(self, small, tmp_path):
        outcome = invoke(*small, "--training-steps", 4)
        assert outcome.exit_code == 0, outcome.output
        for word in ("θ = 0.3", "θ = 1", "expert 3 for all", "untrained", "(4 steps)", "before it learned"):
            assert word in " ".join(outcome.stdout.split())
        assert (tmp_path / "demo" / "dynamoe.png").read_bytes().startswith(b"\x89PNG")
        page = (tmp_path / "demo" / "index.html").read_text()
        assert page.count('class="shade"') == 128
        figures = json.loads((tmp_path / "demo" / "results.json").read_text())["dynamoe"]
        dense, untrained = (
            next(own for own in figures[name] if own["active_fraction"] == 1) for name in ("budgets", "untrained")
        )
        # The weights were trained too, not the routers alone.
        assert dense["perplexity"] != untrained["perplexity"]
        for own, cut in zip(figures["budgets"], figures["untrained"], strict=True):
            assert cut["active_fraction"] >= own["active_fraction"] - 1e-6
        assert [timing["decode_fraction"] for timing in figures["wide"][:5]] == [1, 1, 0.75, 0.5, 0.25]

    @pytest.mark.parametrize(
        ("name", "value", "reason"),
        [("_MOST_PARAMETERS", 10, "too large to be trained"), ("_NUM_EXPERTS", 1, "at least two integers")],
    )
    def test_it_is_left_out_with_a_note(self, small, tmp_path, monkeypatch, name, value, reason):
        monkeypatch.setattr(demo_dynamoe, name, value)
        outcome = invoke(*small, "--training-steps", 1)
        assert outcome.exit_code == 0, outcome.output
        assert "Nested experts are left out" in outcome.stdout
        assert reason in outcome.stdout
        assert not (tmp_path / "demo" / "dynamoe.png").exists()
        assert (tmp_path / "demo" / "mtp.png").exists()


class TestErrors:
    def says(self, outcome, *words):
        assert outcome.exit_code == 2, outcome.output
        flat = " ".join(outcome.output.replace("│", " ").split())
        for word in words:
            assert word in flat

    def test_unknown_model(self, tmp_path, adapter_folder):
        missing = tmp_path / "missing"
        self.says(invoke("--model", missing, "--adapter", adapter_folder), "can't load a causal language model")

    def test_a_model_without_an_adapter_says_how_to_get_one(self, base_folder):
        self.says(invoke("--model", base_folder), "--adapter", "hf-ext mtp train --model")

    def test_unknown_adapter(self, base_folder, tmp_path):
        self.says(invoke("--model", base_folder, "--adapter", tmp_path / "missing"), "can't load the adapter")

    def test_an_adapter_of_another_kind(self, base_folder, lora_folder):
        self.says(invoke("--model", base_folder, "--adapter", lora_folder), "is a LORA adapter, not a multi-token one")

    @pytest.mark.parametrize("k", [0, 4, -1])
    def test_more_guesses_than_masks(self, small, k):
        self.says(invoke(*small, "--k", k), f"--k must be between 1 and 3, the adapter's masks; got {k}")

    def test_a_prompt_that_does_not_fit(self, small):
        self.says(invoke(*small, "--prompt", "x" * 125), "context of 128 tokens")

    @pytest.mark.parametrize("option", [("--num-prompts", 0), ("--max-new-tokens", 0), ("--repeats", 0)])
    def test_numbers_out_of_range(self, small, option):
        self.says(invoke(*small, *option), option[0])


class TestSections:
    def test_each_is_one_function_and_they_share_a_page(self, monkeypatch, tmp_path):
        def make(name):
            return lambda options, console: (Section(name, name.title(), [], [], {"x": 1}), {"device": "cpu"})

        monkeypatch.setitem(SECTIONS, "mtp", make("mtp"))
        monkeypatch.setitem(SECTIONS, "dynamoe", lambda options, console: None)
        monkeypatch.setitem(SECTIONS, "kws", lambda options, console: None)
        monkeypatch.setitem(SECTIONS, "second", make("second"))
        drawn = []
        page = run(DemoOptions(), tmp_path, False, lambda section, path: drawn.append(path.name), Console(quiet=True))
        assert drawn == ["mtp.png", "second.png"]
        assert 'id="second"' in page.read_text()
        assert json.loads((tmp_path / "results.json").read_text())["second"] == {"x": 1}


class TestTable:
    def test_columns_and_the_fastest_is_best(self):
        table = results_table([result(), result("fast", speedup=2.0), result("dense", tokens_per_step=3.0)], "caption")
        assert tuple(table.columns) == COLUMNS
        assert table.rows[0] == ("plain", "1.00", "1.00", "80", "1.00x", "8 of 8", "90%")
        assert table.best == 1


class TestVerdict:
    def said(self, *others, device="cpu", dtype="float32", plain=None):
        return " ".join(verdict([plain or result(), *others], {"device": device, "dtype": dtype}))

    def test_fastest_and_densest_are_told_apart(self):
        said = self.said(result("linear", speedup=2.0), result("quadratic", speedup=1.5, tokens_per_step=3.0))
        assert "linear was the fastest: 2.00 times plain" in said
        assert "Most tokens per step come from quadratic, but its steps take longer here" in said
        assert "exactly the tokens of plain decoding on all prompts" in said

    def test_a_gain_is_not_claimed_where_there_is_none(self):
        assert "no method was faster than plain" in self.said(result("linear", speedup=0.8))

    def test_differences_are_said_and_explained_in_half_precision_only(self):
        other = result("linear", speedup=2.0, num_identical=6)
        said = self.said(other)
        assert "linear differs from that of plain decoding on 2 of 8 prompts" in said
        assert "exactly the tokens" not in said
        assert "float32" not in said
        assert "bfloat16" in self.said(other, dtype="bfloat16")

    def test_a_cpu_is_named_as_what_the_choice_depends_on(self):
        assert "On a CPU" in self.said(result("linear"))
        assert "On a CPU" not in self.said(result("linear"), device="cuda")

    def test_looping_text_is_owned_up_to(self):
        assert "repetitions" in self.said(plain=result(distinct_4grams=0.3))
        assert "repetitions" not in self.said()


def test_importing_the_commands_loads_neither_matplotlib_nor_trl():
    code = "import sys, hf_ext.cli.demo, hf_ext.cli.mtp, hf_ext.cli.dynamoe, hf_ext.cli.kws_train; print('matplotlib' in sys.modules, 'trl' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert output.stdout.split() == ["False", "False"]


def test_spotting_and_conversion_load_no_peft():
    """Importing it takes seconds, and brings quantisation libraries that print."""
    code = "import sys, hf_ext.cli.dynamoe, hf_ext.cli.kws_eval; print('peft' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert output.stdout.split() == ["False"]
