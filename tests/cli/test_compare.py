from types import SimpleNamespace

import pytest
import torch

from hf_ext.cli import compare as module
from hf_ext.cli.compare import (
    Method,
    assisted,
    compare,
    describe_machine,
    multi_token,
    plain,
    prompt_lookup,
    share_weights,
)
from hf_ext.cli.loading import load_base, suitable_threads
from hf_ext.cli.pairs import load_pair


@pytest.fixture(scope="module")
def pair(base_folder, adapter_folder):
    return load_pair(str(base_folder), str(adapter_folder), device="cpu")


def side_by_side(pair, methods, prompts=("abc", "Hello, hello."), **kwargs):
    kwargs = {"max_new_tokens": 12, "repeats": 1, **kwargs}
    return compare(pair.base, pair.adapted, pair.tokenizer, prompts, methods, **kwargs)


class Scripted:
    """Stands in for a model: emits the tokens that it was told to, in steps of the lengths that it was told."""

    def __init__(self, outputs, step_lengths=None, log=None, name=""):
        self.outputs, self.step_lengths, self.log, self.name = iter(outputs), step_lengths, log, name
        self.device = torch.device("cpu")
        self.generation_config = SimpleNamespace(pad_token_id=0)
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=None))

    def eval(self):
        return self

    def register_forward_hook(self, hook):
        self.hook = hook
        return SimpleNamespace(remove=lambda: None)

    def generate(self, input_ids, return_dict_in_generate=False, prompt_lookup_num_tokens=None, **kwargs):
        if self.log is not None:
            self.log.append((self.name, input_ids[0, 0].item()))
        new = next(self.outputs)
        for _ in new:
            if hasattr(self, "hook"):
                self.hook(self, (), None)
        sequences = torch.cat([input_ids, torch.tensor([new])], dim=1)
        if not return_dict_in_generate:
            return sequences
        return SimpleNamespace(
            sequences=sequences, num_steps=torch.tensor([len(self.step_lengths)]), step_lengths=[self.step_lengths]
        )


class TestOnARealModel:
    def test_every_method_writes_what_plain_decoding_writes(self, pair):
        draft = share_weights(pair.base)
        methods = [plain(), prompt_lookup(), assisted(draft), multi_token(2, "linear"), multi_token(3, "quadratic")]
        methods.append(multi_token(3, "adaptive"))
        results = side_by_side(pair, methods)
        assert [result.name for result in results] == [
            "plain",
            "prompt lookup",
            "assisted",
            "multi-token linear, k=2",
            "multi-token quadratic, k=3",
            "multi-token adaptive, k=3",
        ]
        for result in results:
            assert (result.num_identical, result.num_prompts, result.num_tokens) == (2, 2, 24)
            assert result.tokens_per_step == pytest.approx(24 / result.num_steps)
            assert result.seconds > 0
            assert result.tokens_per_second == pytest.approx(24 / result.seconds)

    def test_plain_decoding_takes_one_step_per_token(self, pair):
        (result,) = side_by_side(pair, [plain()])
        assert result.num_steps == 24
        assert result.tokens_per_step == result.speedup == 1.0
        assert all(run.step_lengths == [1] * 12 for run in result.runs)

    def test_a_draft_model_that_is_the_model_itself_saves_passes(self, pair):
        # Every guess is right, so the target's passes are few; passes of the draft are no steps.
        results = side_by_side(pair, [plain(), assisted(share_weights(pair.base))])
        assert results[1].num_steps < results[0].num_steps

    def test_multi_token_steps_add_up_to_the_text(self, pair):
        result = side_by_side(pair, [plain(), multi_token(3, "quadratic")])[1]
        for run in result.runs:
            assert sum(run.step_lengths) == len(run.new_tokens) == 12
            assert len(run.step_lengths) == run.num_steps

    def test_no_hook_stays_behind(self, pair):
        side_by_side(pair, [plain(), prompt_lookup()])
        assert not pair.base._forward_hooks

    def test_prompts_may_be_token_ids(self, pair):
        as_text = side_by_side(pair, [plain()], prompts=["abc"])[0]
        as_ids = side_by_side(pair, [plain()], prompts=[pair.tokenizer("abc")["input_ids"]])[0]
        assert as_text.runs[0].new_tokens == as_ids.runs[0].new_tokens

    def test_result_is_ready_for_json_without_the_runs(self, pair):
        data = side_by_side(pair, [plain()])[0].to_dict()
        assert data["num_tokens"] == 24
        assert "runs" not in data

    def test_a_prompt_that_leaves_no_room_is_refused_with_the_numbers(self, pair):
        with pytest.raises(ValueError, match=r"120 tokens with `max_new_tokens=12` .* context of 128"):
            side_by_side(pair, [plain()], prompts=["x" * 120])

    def test_an_empty_prompt_is_refused(self, pair):
        with pytest.raises(ValueError, match="has no token"):
            side_by_side(pair, [plain()], prompts=["abc", ""])


class TestAccounting:
    def test_methods_take_turns_within_a_prompt_and_start_untimed(self):
        log = []
        base = Scripted([[7, 8]] * 99, log=log, name="base")
        adapted = Scripted([[7, 8]] * 99, [2], log=log, name="adapted")
        compare(base, adapted, None, [[1], [2]], [plain(), multi_token(1, "linear")], repeats=2)
        untimed, first, second = ["base", "adapted"], ["base", "adapted"], ["adapted", "base"]
        assert log == [(name, prompt) for prompt in (1, 2) for name in untimed + first + second]

    def test_median_of_the_repeats_summed_over_prompts(self, monkeypatch):
        seconds = {"base": iter([4.0, 9.0, 2.0, 6.0, 6.0, 6.0]), "adapted": iter([1.0, 2.0, 50.0, 3.0, 3.0, 3.0])}

        def timed(model, prompt_ids, kwargs, tokenizer):
            return [7, 8], next(seconds[model.name])

        monkeypatch.setattr(module, "_timed", timed)
        base, adapted = Scripted([[7, 8]] * 9, name="base"), Scripted([[7, 8]] * 9, [2], name="adapted")
        results = compare(base, adapted, None, [[1], [2]], [plain(), multi_token(1, "linear")], repeats=3)
        assert [result.seconds for result in results] == [4.0 + 6.0, 2.0 + 3.0]
        assert results[1].speedup == pytest.approx(2.0)
        assert results[1].tokens_per_second == pytest.approx(4 / 5)

    def test_another_token_anywhere_is_not_identical_and_is_located(self):
        base = Scripted([[5, 6, 7]] * 4)
        adapted = Scripted([[5, 6, 7], [5, 6, 7], [5, 9, 7], [5, 9, 7]], [3])
        result = compare(base, adapted, None, [[1], [2]], [plain(), multi_token(1, "linear")], repeats=1)[1]
        assert result.num_identical == 1
        assert [run.first_difference for run in result.runs] == [None, 1]

    def test_a_difference_in_a_timed_run_alone_counts_too(self):
        base = Scripted([[5, 6, 7]] * 3)
        adapted = Scripted([[5, 6, 7], [5, 6, 7], [5, 6]], [3])
        result = compare(base, adapted, None, [[1]], [plain(), multi_token(1, "linear")], repeats=2)[1]
        assert result.num_identical == 0
        assert result.runs[0].first_difference == 2

    def test_speed_is_compared_per_token_where_the_lengths_differ(self, monkeypatch):
        monkeypatch.setattr(module, "_timed", lambda model, prompt_ids, kwargs, tokenizer: ([5], 1.0))
        base, adapted = Scripted([[5, 6, 7, 8]]), Scripted([[5, 6]], [2])
        result = compare(base, adapted, None, [[1]], [plain(), multi_token(1, "linear")], repeats=1)[1]
        assert result.speedup == pytest.approx(0.5)

    def test_loops_show_in_the_distinct_ngrams(self):
        (result,) = compare(Scripted([[5] * 23] * 2), None, None, [[1]], [plain()], repeats=1)
        assert result.distinct_4grams == pytest.approx(1 / 20)

    def test_steps_of_a_method_that_reports_none_are_unknown(self):
        base = Scripted([[5, 6]] * 2)
        base.register_forward_hook = lambda hook: SimpleNamespace(remove=lambda: hook(base, (), None))
        (result,) = compare(base, None, None, [[1]], [prompt_lookup()], repeats=1)
        assert result.num_steps == 1
        assert result.runs[0].step_lengths is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "`prompts` is empty"),
        ({"methods": []}, "`methods` is empty"),
        ({"repeats": 0}, "`repeats` must be at least 1, got 0"),
        ({"methods": [plain(), multi_token(2, "linear")]}, "need `adapter_model`"),
    ],
)
def test_what_can_not_be_compared_is_refused(changes, message):
    arguments = {"prompts": [[1]], "methods": [plain()], "repeats": 1, **changes}
    with pytest.raises(ValueError, match=message):
        compare(Scripted([]), None, None, **arguments)


def test_method_names_are_the_callers():
    assert Method("mine", {"num_beams": 1}).name == "mine"


class TestLoading:
    def test_shared_weights_are_the_same_tensors_in_other_modules(self, base_folder):
        model, _ = load_base(str(base_folder), device="cpu")
        twin = share_weights(model)
        assert twin is not model
        for (name, ours), (twin_name, theirs) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
            assert name == twin_name
            assert ours.data_ptr() == theirs.data_ptr()

    def test_the_base_of_a_pair_is_free_of_the_adapter(self, pair):
        assert not any("lora" in name for name, _ in pair.base.named_modules())
        assert any("lora" in name for name, _ in pair.adapted.named_modules())

    def test_small_models_get_one_thread_and_the_setting_is_restored(self, pair):
        before = torch.get_num_threads()
        with suitable_threads(pair.base):
            assert torch.get_num_threads() == 1
        with suitable_threads(pair.base, 2):
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == before

    def test_machine_is_described(self, pair):
        machine = describe_machine(pair.base)
        assert machine["device"] == "cpu"
        assert machine["dtype"] == "float32"
        assert machine["torch"] == torch.__version__
        assert all(machine.values())
