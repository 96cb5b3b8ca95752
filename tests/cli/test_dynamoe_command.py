import json

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hf_ext import convert_to_dynamoe
from hf_ext.cli import app
from hf_ext.cli.compare import share_weights
from hf_ext.cli.dynamoe_bench import dense_of
from hf_ext.cli.dynamoe_budgets import Budget, batches_of, measure
from hf_ext.cli.dynamoe_views import cheapest, interpolated, shortened, trade_off, verdict
from hf_ext.cli.training_text import token_rows


def invoke(*arguments):
    return CliRunner().invoke(app, ["dynamoe", *map(str, arguments)], env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"})


def says(outcome, *words):
    assert outcome.exit_code == 2, outcome.output
    flat = " ".join(outcome.output.replace("│", " ").split())
    for word in words:
        assert word in flat


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    pytest.importorskip("datasets")
    file = tmp_path_factory.mktemp("texts") / "texts.txt"
    file.write_text("".join(f"row number {i} of some text\n" for i in range(8)))
    return file


@pytest.fixture(scope="module")
def nested(base_folder, tokenizer):
    """In memory, with routers that spread the tokens."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    model = convert_to_dynamoe(model, 4, importance="none", router_hidden_size=8, disable_tqdm=True).eval()
    for mlp in model.nested_mlps():
        torch.nn.init.normal_(mlp.router.out.weight, std=2.0)
        torch.nn.init.zeros_(mlp.router.out.bias)
    return model


@pytest.fixture(scope="module")
def nested_folder(nested, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("nested") / "moe"
    nested.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("command", ["convert", "train", "eval", "bench"])
def test_help_shows_an_example(command):
    outcome = invoke(command, "--help")
    assert outcome.exit_code == 0
    assert f"Example: hf-ext dynamoe {command}" in outcome.stdout


class TestConvert:
    @pytest.mark.parametrize("form", [(), ("--by-shards",)])
    def test_prints_the_receipt_and_computes_the_same(self, base_folder, texts, tmp_path, form):
        folder = tmp_path / "moe"
        outcome = invoke(
            *("convert", "--model", base_folder, "--dataset", texts, "--output-dir", folder, "--widths", "8,20,32"),
            *("--router-hidden-size", 8, "--device", "cpu", *form),
        )
        assert outcome.exit_code == 0, outcome.output
        for word in ("activation_norm", "largest difference of a logit", "hf-ext dynamoe train --model", "62%"):
            assert word in " ".join(outcome.stdout.split())
        moe, dense = (AutoModelForCausalLM.from_pretrained(name) for name in (folder, base_folder))
        assert moe.config.expert_widths == [8, 20, 32]
        ids = torch.arange(10)[None]
        torch.testing.assert_close(moe(ids).logits, dense(ids).logits, atol=1e-4, rtol=1e-4)
        assert (folder / "tokenizer.json").exists()

    def test_without_text_neurons_keep_their_order(self, base_folder, tmp_path):
        folder = tmp_path / "moe"
        outcome = invoke(
            *("convert", "--model", base_folder, "--importance", "none", "--num-experts", 2, "--output-dir", folder),
            *("--router-type", "classifier"),
        )
        assert outcome.exit_code == 0, outcome.output
        assert "neurons as they were" in " ".join(outcome.stdout.split())
        assert AutoModelForCausalLM.from_pretrained(folder).config.router_type == "classifier"

    def test_errors_say_the_way_out(self, base_folder, nested_folder, texts, tmp_path):
        model = ("convert", "--model", base_folder, "--output-dir", tmp_path / "x")
        says(invoke(*model), "--dataset", "--importance none")
        says(invoke(*model, "--importance", "none", "--num-experts", 5), "doesn't divide", "expert_widths")
        says(invoke(*model, "--importance", "none", "--widths", "8,x"), "--widths must be integers")
        says(invoke(*model, "--importance", "none", "--widths", "20,8"), "must ascend")
        says(invoke(*model, "--dataset", tmp_path / "missing.txt"), "can't load a dataset")
        says(
            invoke("convert", "--model", tmp_path / "missing", "--importance", "none"), "can't load a causal language"
        )
        nested = ("convert", "--model", nested_folder, "--importance", "none")
        says(invoke(*nested, "--output-dir", tmp_path / "x"), "already: convert the dense model")
        says(invoke(*nested, "--output-dir", nested_folder), "own folder: take another")
        model += ("--importance", "none")
        says(invoke(*model, "--dtype", "float33"), "--dtype must be", "got 'float33'")
        says(invoke(*model, "--device", "abacus"), "--device abacus can't be used here")
        says(invoke(*model, "--by-shards", "--dtype", "bfloat16"), "--by-shards keeps the number format", "leave out")
        says(invoke(*model, "--by-shards", "--device", "abacus"), "--device abacus can't be used here")
        assert not (tmp_path / "x").exists()
        (tmp_path / "x").write_text("")
        says(invoke(*model), "--output-dir", "is a file")
        for form in ((), ("--by-shards",)):
            convert = ("convert", "--model", base_folder, "--importance", "none", *form)
            says(invoke(*convert, "--output-dir", tmp_path / "x" / "y"), "can't make the folder", str(tmp_path / "x"))
            says(invoke(*convert, "--output-dir", tmp_path / "a" / "b", "--num-experts", 5), "doesn't divide")
        assert [path.name for path in tmp_path.iterdir()] == ["x"]

    @pytest.mark.parametrize("form", [(), ("--by-shards",)])
    def test_what_is_there_already_stays(self, base_folder, tmp_path, form):
        """It may have been trained since."""
        convert = ("convert", "--model", base_folder, "--importance", "none", "--output-dir", tmp_path, *form)
        (tmp_path / "README.md").write_text("Trained for a week.")
        says(invoke(*convert), f"--output-dir {tmp_path} is not empty", "take another")
        assert [file.name for file in tmp_path.iterdir()] == ["README.md"]

    def test_an_empty_folder_is_filled_even_where_one_stands_in_it(self, base_folder, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        outcome = invoke("convert", "--model", base_folder, "--importance", "none", "--output-dir", ".")
        assert outcome.exit_code == 0, outcome.output
        assert (tmp_path / "config.json").exists() and not [path for path in tmp_path.iterdir() if path.is_dir()]

    def test_a_dense_model_that_is_cut_off(self, base_folder, tmp_path):
        for file in base_folder.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes()[: 100 if file.suffix == ".safetensors" else None])
        says(invoke("convert", "--model", tmp_path, "--importance", "none"), "can't load", str(tmp_path))

    def test_nothing_is_left_of_a_conversion_that_ends_halfway(self, base_folder, tmp_path, monkeypatch):
        def full(*_, **__):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", full)
        model = ("convert", "--model", base_folder, "--importance", "none", "--device", "cpu")
        says(invoke(*model, "--output-dir", tmp_path / "x"), "No space left on device")
        assert not list(tmp_path.iterdir())


class TestTrain:
    def test_the_model_that_it_trains_is_saved_and_evaluated(self, nested_folder, texts, tmp_path):
        pytest.importorskip("trl")
        folder = tmp_path / "out"
        outcome = invoke(
            *("train", "--model", nested_folder, "--dataset", texts, "--output-dir", folder, "--device", "cpu"),
            *("--steps", 2, "--router-steps", 1, "--batch-size", 2, "--eval-rows", 2, "--distillation-weight", 1),
        )
        assert outcome.exit_code == 0, outcome.output
        for word in ("θ = 0.5", "θ = 1", "router", "hf-ext dynamoe eval --model"):
            assert word in outcome.stdout
        assert type(AutoModelForCausalLM.from_pretrained(folder)).__name__ == "DynaMoeForCausalLM"
        card = (folder / "README.md").read_text()
        assert "| steps | 2 |" in card and "at sensitivity 0.5" in card and str(tmp_path) not in card

    def test_a_dense_model_says_how_to_convert_it(self, base_folder, texts):
        pytest.importorskip("trl")
        says(invoke("train", "--model", base_folder, "--dataset", texts), "hf-ext dynamoe convert --model")

    def test_errors_say_the_way_out(self, nested_folder, texts, tmp_path):
        pytest.importorskip("trl")
        train = ("train", "--model", nested_folder, "--output-dir", tmp_path / "out", "--steps", 1)
        says(invoke(*train, "--dataset", texts, "--resume"), "--resume finds no checkpoint in", "leave it out")
        says(invoke(*train, "--dataset", texts, "--learning-rate", -1), "--learning-rate")
        says(invoke(*train, "--dataset", texts, "--router-learning-rate", -1), "--router-learning-rate")
        table = tmp_path / "table.csv"
        table.write_text("label\n3\n4\n")
        says(invoke(*train, "--dataset", table), "none of the columns", "prompt, text", "only ['label']")
        ids = tmp_path / "ids.jsonl"
        ids.write_text('{"input_ids": [1, 2]}\n{"input_ids": [1, 9999]}\n')
        says(invoke(*train, "--dataset", ids), "row 1 of the dataset holds the token 9999", "vocabulary")
        ids.write_text('{"input_ids": [1, 2]}\n{"input_ids": null}\n')
        says(invoke(*train, "--dataset", ids), "row 1 of the dataset has `input_ids` that are no list of tokens: None")
        prompts = tmp_path / "prompts.jsonl"
        prompts.write_text('{"prompt": "abc"}\n')
        says(invoke(*train, "--dataset", prompts), "a `prompt` and no `completion`", "only ['prompt']")
        nulls = tmp_path / "nulls.jsonl"
        nulls.write_text('{"text": "abc"}\n{"text": null}\n')
        says(invoke(*train, "--dataset", nulls), "row 1 of the dataset has no text", "None")
        assert not (tmp_path / "out").exists()
        train = ("train", "--model", nested_folder, "--dataset", texts, "--steps", 1)
        says(invoke(*train, "--output-dir", table / "out"), "can't make the folder", str(table))

    def test_what_is_refused_leaves_no_folder_behind(self, nested_folder, texts, tmp_path):
        """Of a setting, which is refused before the trainer makes one too; a folder that was there stays."""
        pytest.importorskip("trl")
        (tmp_path / "mine").mkdir()
        train = ("train", "--model", nested_folder, "--dataset", texts, "--steps", 1, "--device", "cpu")
        for folder in (tmp_path / "mine", tmp_path / "a" / "b"):
            says(invoke(*train, "--active-fraction", 0.5, "--output-dir", folder), "`active_fraction`=0.5 is a budget")
        assert [path.name for path in tmp_path.iterdir()] == ["mine"]

    def test_a_repository_that_can_not_be_pushed_to_is_said_before_training(
        self, nested_folder, texts, tmp_path, monkeypatch
    ):
        pytest.importorskip("trl")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        train = ("train", "--model", nested_folder, "--dataset", texts, "--output-dir", tmp_path / "out", "--steps", 1)
        says(invoke(*train, "--push-to-hub", "me/x", "--device", "cpu"), "offline mode")
        assert not (tmp_path / "out").exists()

    def test_a_training_that_diverges_says_so(self, nested_folder, texts, tmp_path):
        pytest.importorskip("trl")
        outcome = invoke(
            *("train", "--model", nested_folder, "--dataset", texts, "--output-dir", tmp_path / "out", "--steps", 6),
            *("--router-steps", 0, "--learning-rate", 1e30, "--device", "cpu", "--batch-size", 2),
        )
        assert outcome.exit_code == 1
        assert "Training diverged: take a --learning-rate below 1e+30" in " ".join(outcome.output.split())
        assert not (tmp_path / "out" / "model.safetensors").exists()


class TestEval:
    def test_table_pictures_page_and_figures(self, nested_folder, texts, tmp_path):
        pytest.importorskip("matplotlib")
        folder = tmp_path / "eval"
        outcome = invoke(
            *("eval", "--model", nested_folder, "--dataset", texts, "--output-dir", folder, "--device", "cpu"),
            *("-s", 0.3, "-s", 0.6, "--show", 0.6, "--repeats", 1, "--text", "abc <b>"),
        )
        assert outcome.exit_code == 0, outcome.output
        for word in ("θ = 0.3", "θ = 0.6", "θ = 1", "expert 1 for all", "expert 3 for all"):
            assert word in outcome.stdout
        for name in ("trade_off", "experts", "routers", "text"):
            assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        page = (folder / "index.html").read_text()
        assert page.count('class="shade"') == len("abc <b>")
        assert "of the MLPs; by layer: " in page
        assert str(folder.parent) not in page
        figures = json.loads((folder / "results.json").read_text())
        assert [budget["sensitivity"] for budget in figures["budgets"]] == [0.3, 0.6, 1.0, None, None, None]

    def test_errors_say_the_way_out(self, base_folder, nested_folder, texts, tmp_path):
        pytest.importorskip("matplotlib")
        says(invoke("eval", "--model", base_folder, "--dataset", texts), "hf-ext dynamoe convert --model")
        model = ("eval", "--model", nested_folder, "--dataset", texts, "--device", "cpu")
        says(invoke(*model, "-s", 1.5), "--sensitivity")
        says(invoke(*model, "-s", 0.5, "--show", 0.6), "--show 0.6 is none", "[0.5, 1.0]")
        says(invoke(*model, "--output-dir", texts / "x"), "can't make the folder", str(texts))
        ids = tmp_path / "ids.jsonl"
        ids.write_text('{"input_ids": [1, 9999]}\n')
        says(invoke("eval", "--model", nested_folder, "--dataset", ids), "row 0 of the dataset holds the token 9999")
        ids.write_text('{"messages": [{"role": "user", "content": "abc"}]}\n')
        says(invoke("eval", "--model", nested_folder, "--dataset", ids), "can't read the dataset", "chat_template")


class TestBench:
    def test_a_model(self, nested_folder, tmp_path):
        file = tmp_path / "sub" / "bench.json"
        outcome = invoke(
            *(
                "bench",
                "--model",
                nested_folder,
                "-s",
                0.5,
                "--prompt",
                "abc",
                "--prompt-tokens",
                8,
                "--new-tokens",
                2,
            ),
            *("--repeats", 1, "--json", file, "--device", "cpu"),
        )
        assert outcome.exit_code == 0, outcome.output
        timings = json.loads(file.read_text())["timings"]
        assert [timing["name"] for timing in timings] == [
            "dense", *(f"expert {e} for all" for e in (4, 3, 2, 1)), "routers, θ = 0.5",
        ]  # fmt: skip
        assert [timing["decode_fraction"] for timing in timings[:5]] == [1, 1, 0.75, 0.5, 0.25]
        assert timings[0]["prefill_speedup"] == 1
        assert 0.25 <= timings[-1]["prefill_fraction"] <= 1

    def test_random_weights_spread_over_the_experts(self):
        outcome = invoke("bench", "--shape", "64,96,1", "--repeats", 1, "--new-tokens", 2, "--num-experts", 3)
        assert outcome.exit_code == 0, outcome.output
        assert "expert 3 for all" in outcome.stdout
        assert "routers, θ = 0.7" in outcome.stdout

    def test_errors_say_the_way_out(self, nested_folder, base_folder):
        says(invoke("bench"), "either --model", "--shape 2048,8192,8")
        says(invoke("bench", "--model", nested_folder, "--shape", "64,96,1"), "either --model")
        says(invoke("bench", "--model", base_folder), "hf-ext dynamoe convert --model")
        says(invoke("bench", "--shape", "64,96"), "hidden,intermediate,layers", "got 64,96")
        says(invoke("bench", "--shape", "65,96,1"), "multiple of 64")
        says(invoke("bench", "--shape", "64,96,1", "--num-experts", 5), "doesn't divide")
        says(invoke("bench", "--shape", "64,96,1", "--dtype", "int8"), "--dtype must be")
        says(invoke("bench", "--shape", "64,96,1", "--prompt", "a"), "--prompt needs a --model")
        says(invoke("bench", "--model", nested_folder, "--prompt-tokens", 120), "context of 128 tokens")
        file = nested_folder / "config.json" / "bench.json"
        says(invoke("bench", "--shape", "64,96,1", "--json", file), "can't make the folder", "config.json")

    def test_the_dense_model_is_the_nested_one_without_experts(self, nested):
        dense, ids = dense_of(nested), torch.arange(10)[None]
        assert "router" not in "".join(name for name, _ in dense.named_modules())
        assert dense(ids).logits.equal(nested(ids, sensitivity=1.0).logits)
        assert nested(ids, sensitivity=0.5, output_router_logits=True).expert_index.unique().numel() > 1


class TestMeasure:
    @pytest.fixture
    def rows(self, tokenizer):
        return [tokenizer(text)["input_ids"] for text in ("hello you there", "hi", "another text of some length")]

    @torch.no_grad()
    def test_perplexity_is_that_of_the_model_row_by_row(self, nested, rows):
        own = share_weights(nested)
        (routed, dense, fixed) = measure(own, batches_of(rows, 2, "cpu"), [0.5, 1.0], experts=[1], repeats=1)
        for budget, call in (
            (routed, {"sensitivity": 0.5}),
            (dense, {"sensitivity": 1.0}),
            (fixed, {"expert_index": 1}),
        ):
            losses = []
            for row in rows:
                ids = torch.tensor([row])
                logits = nested(ids, **call).logits[0, :-1]
                losses.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
            assert budget.perplexity == pytest.approx(float(torch.cat(losses).mean().exp()), rel=1e-4)
            assert budget.seconds > 0

    def test_budgets_count_tokens_without_padding(self, nested, rows):
        (routed, dense) = measure(share_weights(nested), batches_of(rows, 3, "cpu"), [0.5, 1.0], repeats=0)
        assert dense.active_fraction == 1
        assert dense.active_parameters == nested.num_parameters()
        assert dense.shares == [[0, 0, 0, 1]] * 2
        assert dense.confusion is None and dense.router_accuracy is None
        assert [sum(map(sum, layer)) for layer in routed.confusion] == [sum(map(len, rows))] * 2
        assert routed.active_fraction < 1
        # Columns of the confusion are where tokens went.
        for layer, shares in zip(routed.confusion, routed.shares, strict=True):
            columns = [sum(column) for column in zip(*layer, strict=True)]
            assert columns == pytest.approx([share * sum(columns) for share in shares])

    def test_rows_of_tokens_texts_and_conversations(self, tokenizer):
        datasets = pytest.importorskip("datasets")
        import typer

        ids = [tokenizer(text)["input_ids"] for text in ("hello", "you")]
        assert token_rows(datasets.Dataset.from_dict({"text": ["hello", "", "you"]}), tokenizer, 9, 99) == ids
        assert token_rows(datasets.Dataset.from_dict({"input_ids": ids}), tokenizer, 3, 99) == [ids[0][:3], ids[1]]
        assert token_rows(datasets.Dataset.from_dict({"input_ids": ids}), tokenizer, 9, 6) == [ids[0]]
        with pytest.raises(typer.BadParameter, match="none of `text`"):
            token_rows(datasets.Dataset.from_dict({"x": ["a"]}), tokenizer, 9, 9)
        with pytest.raises(typer.BadParameter, match="two tokens or more"):
            token_rows(datasets.Dataset.from_dict({"text": ["", "a"]}), tokenizer, 9, 9)


def budget(sensitivity, perplexity, fraction, seconds=1.0, accuracy=0.5):
    right = int(10 * accuracy)
    confusion = [[[right, 10 - right], [0, 0]]] if sensitivity is not None and sensitivity < 1 else None
    name = "expert" if sensitivity is None else f"θ = {sensitivity}"
    return Budget(name, sensitivity, perplexity, fraction, 1e6 * fraction, seconds, [[0.5, 0.5]], confusion)


class TestViews:
    @pytest.fixture
    def budgets(self):
        return [budget(0.5, 4.0, 0.4), budget(0.9, 2.0, 0.6, 0.7), budget(1.0, 1.95, 1.0), budget(None, 3.5, 0.5)]

    def test_the_cheapest_that_is_nearly_dense(self, budgets):
        assert cheapest(budgets) is budgets[1]
        assert cheapest([budgets[0], budgets[2]]) is budgets[2]

    def test_perplexity_between_two_budgets(self, budgets):
        assert interpolated(budgets, 0.5) == pytest.approx(8**0.5)
        assert interpolated(budgets, 0.4) == pytest.approx(4.0)
        assert interpolated(budgets, 0.2) is None

    def test_what_is_said(self, budgets):
        said = " ".join(verdict(budgets))
        assert "At θ = 0.9 a token uses 60% of the MLPs on average, and perplexity is 2.000 against 1.950" in said
        assert "all tokens get 50%, perplexity is 3.500; where routers hand out the same on average, 2.828" in said
        assert "50% of the tokens" in said
        assert "Time does not follow" not in said
        budgets[1].seconds = 1.0
        assert "Time does not follow" in " ".join(verdict(budgets))

    def test_a_gain_is_not_claimed_where_there_is_none(self, budgets):
        assert "No sensitivity below 1" in " ".join(verdict([budgets[0], budgets[2]]))
        assert "train them" in " ".join(verdict([budget(0.5, 2.0, 1.0), budget(1.0, 2.0, 1.0)]))

    def test_a_hopeless_expert_does_not_flatten_the_curves(self, budgets):
        (by_size, by_time) = trade_off([*budgets, budget(None, 400.0, 0.25)])
        for curve in (by_size, by_time):
            assert [name for name, _ in curve.series] == ["routers", "one expert for all"]
            assert max(y for _, points in curve.series for _, y, _ in points) == 4.0

    @pytest.mark.parametrize(("number", "said"), [(950, "950"), (26_000, "26k"), (7.24e9, "7.24B"), (1.5e6, "1.5M")])
    def test_numbers_as_people_say_them(self, number, said):
        assert shortened(number) == said
