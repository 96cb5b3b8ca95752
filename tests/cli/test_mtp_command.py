import json

import pytest
from typer.testing import CliRunner

from hf_ext.cli import app
from hf_ext.cli.training_text import load_rows, prompts_of


def invoke(*arguments):
    return CliRunner().invoke(app, ["mtp", *map(str, arguments)], env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"})


@pytest.fixture
def models(base_folder, adapter_folder):
    return "--model", base_folder, "--adapter", adapter_folder, "--device", "cpu"


@pytest.mark.parametrize("command", ["train", "generate", "bench"])
def test_help_shows_an_example(command):
    outcome = invoke(command, "--help")
    assert outcome.exit_code == 0
    assert f"Example: hf-ext mtp {command}" in outcome.stdout


class TestGenerate:
    @pytest.mark.parametrize("strategy", ["linear", "quadratic", "adaptive"])
    def test_streams_what_plain_decoding_writes(self, models, base_folder, tokenizer, strategy):
        from transformers import AutoModelForCausalLM

        outcome = invoke("generate", *models, "--prompt", "abc", "--max-new-tokens", 9, "--strategy", strategy)
        assert outcome.exit_code == 0, outcome.output
        inputs = tokenizer("abc", return_tensors="pt", return_token_type_ids=False)
        base = AutoModelForCausalLM.from_pretrained(base_folder)
        plain = tokenizer.decode(base.generate(**inputs, max_new_tokens=9, do_sample=False)[0])
        assert outcome.stdout.strip() == plain.strip()
        assert "9 tokens in" in outcome.stderr

    def test_more_guesses_than_masks(self, models):
        outcome = invoke("generate", *models, "--prompt", "abc", "--k", 4)
        assert outcome.exit_code == 2
        assert "num_masks" in outcome.output

    def test_unknown_strategy(self, models):
        outcome = invoke("generate", *models, "--prompt", "abc", "--strategy", "cubic")
        assert outcome.exit_code == 2
        assert "quadratic" in outcome.output


class TestBench:
    def test_table_over_guesses_and_strategies_and_json(self, models, tmp_path):
        file = tmp_path / "sub" / "bench.json"
        outcome = invoke(
            "bench",
            *models,
            "--prompt",
            "abc",
            "--max-new-tokens",
            8,
            "--repeats",
            1,
            "--k",
            3,
            "--k",
            1,
            "--json",
            file,
        )
        assert outcome.exit_code == 0, outcome.output
        figures = json.loads(file.read_text())
        assert [method["name"] for method in figures["methods"]] == [
            "plain",
            "prompt lookup",
            *(f"multi-token {strategy}, k={k}" for strategy in ("linear", "adaptive", "quadratic") for k in (1, 3)),
        ]
        for method in figures["methods"]:
            assert method["name"] in outcome.stdout
            assert method["num_identical"] == method["num_prompts"] == 1
        assert "Measured on: " in outcome.stdout

    def test_one_strategy_without_prompt_lookup_on_prompts_of_a_file(self, models, tmp_path):
        (tmp_path / "prompts.txt").write_text("first one\n\nsecond one\n")
        outcome = invoke(
            *("bench", *models, "--prompts-file", tmp_path / "prompts.txt", "--strategy", "linear", "--k", 2),
            *("--no-prompt-lookup", "--max-new-tokens", 4, "--repeats", 1, "--json", tmp_path / "bench.json"),
        )
        assert outcome.exit_code == 0, outcome.output
        figures = json.loads((tmp_path / "bench.json").read_text())
        assert figures["prompts"] == ["first one", "second one"]
        assert [method["name"] for method in figures["methods"]] == ["plain", "multi-token linear, k=2"]

    @pytest.mark.parametrize("k", [0, 4])
    def test_guesses_out_of_range(self, models, k):
        outcome = invoke("bench", *models, "--k", k)
        assert outcome.exit_code == 2
        assert "between 1 and 3" in outcome.output

    def test_a_file_without_prompts(self, models, tmp_path):
        (tmp_path / "empty.txt").write_text("\n")
        outcome = invoke("bench", *models, "--prompts-file", tmp_path / "empty.txt")
        assert outcome.exit_code == 2
        assert "holds no prompt" in outcome.output


class TestTrain:
    @pytest.fixture
    def dataset(self, tmp_path):
        pytest.importorskip("trl")
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps({"text": f"row number {i} of some text"}) + "\n" for i in range(8)))
        return file

    def train(self, base_folder, dataset, output_dir, *more):
        return invoke(
            *("train", "--model", base_folder, "--dataset", dataset, "--output-dir", output_dir, "--device", "cpu"),
            *("--steps", 2, "--batch-size", 2, "--anchors", 4, "--num-masks", 2, "--rank", 2, "--max-length", 32),
            *("--eval-rows", 2, "--completion-tokens", 8, "--prompt-tokens", 4, *more),
        )

    @pytest.mark.parametrize("policy", ["--on-policy", "--no-on-policy"])
    def test_the_adapter_that_it_trains_generates(self, base_folder, dataset, tmp_path, policy):
        outcome = self.train(base_folder, dataset, tmp_path / "out", policy)
        assert outcome.exit_code == 0, outcome.output
        assert "eval_decoded_tokens_per_step" in outcome.stdout
        assert (tmp_path / "out" / "completions.jsonl").exists() == (policy == "--on-policy")
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert (config["num_masks"], config["r"], config["lora_alpha"]) == (2, 2, 4)
        outcome = invoke(
            *("generate", "--model", base_folder, "--adapter", tmp_path / "out", "--device", "cpu"),
            *("--prompt", "abc", "--max-new-tokens", 5),
        )
        assert outcome.exit_code == 0, outcome.output

    def test_unknown_dataset(self, base_folder, tmp_path):
        outcome = self.train(base_folder, tmp_path / "missing.jsonl", tmp_path / "out")
        assert outcome.exit_code == 2
        assert "can't load a dataset from" in outcome.output

    @pytest.mark.parametrize(
        ("more", "said"),
        [
            (("--learning-rate", -1), "learning-rate"),
            (("--resume",), "--resume finds no checkpoint"),
            (("--dtype", "float7"), "float7"),
            (("--push-to-hub", "not a name"), "not a name"),
        ],
    )
    def test_bad_settings_are_refused_before_any_text_is_written(self, base_folder, dataset, tmp_path, more, said):
        outcome = self.train(base_folder, dataset, tmp_path / "out", *more)
        assert outcome.exit_code == 2, outcome.output
        assert said in outcome.output
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("rows", "said"),
        [
            ([{"answer": "a"}] * 4, "has none of the columns"),
            ([{"text": "a"}, {"text": None}, {"text": "b"}], "row 1 of the dataset has no text"),
            ([{"input_ids": [1, 2]}, {"input_ids": [1, 100_000]}], "holds the token 100000"),
        ],
    )
    def test_rows_that_cannot_be_read(self, base_folder, tmp_path, rows, said):
        pytest.importorskip("trl")
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        outcome = self.train(base_folder, file, tmp_path / "out", "--no-on-policy")
        assert outcome.exit_code == 2, outcome.output
        assert said in outcome.output

    def test_an_output_that_is_a_file(self, base_folder, dataset, tmp_path):
        (tmp_path / "out").write_text("")
        outcome = self.train(base_folder, dataset, tmp_path / "out")
        assert outcome.exit_code == 2
        assert "is a file" in outcome.output


class TestRows:
    @pytest.fixture(autouse=True)
    def _needs_datasets(self):
        pytest.importorskip("datasets")

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("x.jsonl", '{"text": "a"}\n{"text": "b"}\n'),
            ("x.txt", "a\nb\n"),
            ("x.csv", "text\na\nb\n"),
        ],
    )
    def test_files(self, tmp_path, name, content):
        (tmp_path / name).write_text(content)
        rows = load_rows(str(tmp_path / name))
        assert list(rows["text"]) == ["a", "b"]
        assert list(load_rows(str(tmp_path / name), max_rows=1)["text"]) == ["a"]

    def test_folders_of_files_and_saved_datasets(self, tmp_path):
        from datasets import Dataset, DatasetDict

        data = Dataset.from_dict({"text": ["a", "b"]})
        data.save_to_disk(tmp_path / "one")
        DatasetDict({"train": data.select([0]), "test": data.select([1])}).save_to_disk(tmp_path / "two")
        (tmp_path / "three").mkdir()
        (tmp_path / "three" / "train.jsonl").write_text('{"text": "c"}\n')
        assert list(load_rows(str(tmp_path / "one"))["text"]) == ["a", "b"]
        assert list(load_rows(str(tmp_path / "two"), split="test")["text"]) == ["b"]
        assert list(load_rows(str(tmp_path / "three"))["text"]) == ["c"]

    def test_unknown_endings_broken_files_and_no_rows_are_refused(self, tmp_path):
        import typer

        (tmp_path / "x.xyz").write_text("a")
        with pytest.raises(typer.BadParameter, match="ends in none of"):
            load_rows(str(tmp_path / "x.xyz"))
        (tmp_path / "header.csv").write_text("text\n")
        with pytest.raises(typer.BadParameter, match="no data"):
            load_rows(str(tmp_path / "header.csv"))
        (tmp_path / "broken.jsonl").write_text('{"text": ')
        with pytest.raises(typer.BadParameter, match="can't load a dataset from"):
            load_rows(str(tmp_path / "broken.jsonl"))

    def test_prompts_by_column(self, tokenizer):
        import typer
        from datasets import Dataset

        ids = [tokenizer(text)["input_ids"] for text in ("hello", "you")]
        assert prompts_of(Dataset.from_dict({"prompt": ["hello", "", "you"]}), tokenizer) == ids
        assert prompts_of(Dataset.from_dict({"mine": ["hello", "you"]}), tokenizer, "mine") == ids
        texts = Dataset.from_dict({"text": ["hello there", "you"]})
        assert prompts_of(texts, tokenizer, num_tokens=5) == ids
        # Named by the caller, a text is a whole prompt.
        assert len(prompts_of(texts, tokenizer, "text", num_tokens=5)[0]) == len("hello there")
        with pytest.raises(typer.BadParameter, match="no column 'other'"):
            prompts_of(texts, tokenizer, "other")
        with pytest.raises(typer.BadParameter, match="row 0 of the dataset has the prompt 3"):
            prompts_of(Dataset.from_dict({"prompt": [3]}), tokenizer)

    def test_conversations_are_cut_before_the_last_answer(self, tokenizer, monkeypatch):
        from datasets import Dataset

        template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
        monkeypatch.setattr(tokenizer, "chat_template", template)
        user, answer = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
        rows = Dataset.from_dict({"messages": [[user, answer, user, answer], [user]]})
        prompts = [tokenizer.decode(ids) for ids in prompts_of(rows, tokenizer)]
        assert prompts == ["u:hi;a:ho;u:hi;a:", "u:hi;a:"]
