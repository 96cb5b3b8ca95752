"""Training text in the model's own words: complete, in order, and the same after an interruption."""

import json

import pytest
import torch
from peft import get_peft_model
from tokenizers import Tokenizer, decoders, models
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
)

from hf_ext import generate_completions
from mtp.models import randomise
from mtp.training.setting import EOS, PAD, gated, tiny_lm, tiny_tokenizer, tiny_trainer


PROMPTS = [[4, 5, 6], [7], [8, 9, 10, 11, 5], [6, 6], [18, 19], [12, 13, 4, 4], [9]]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model():
    """One whose greedy texts end, some soon, some late and some not at all."""
    return often_ending(tiny_lm(seed=4))


def often_ending(model):
    with torch.no_grad():
        model.get_output_embeddings().weight[EOS] *= 3
    return model


def completed(model, processing_class, prompts=PROMPTS, **arguments):
    if "generation_config" not in arguments:
        arguments = {"max_new_tokens": 12, **arguments}
    return generate_completions(
        model, processing_class, prompts, **{"batch_size": 3, "disable_tqdm": True, **arguments}
    )


def completions(rows) -> list[list[int]]:
    return [
        [token for token, completed in zip(ids, mask, strict=True) if completed]
        for ids, mask in zip(rows["input_ids"], rows["completion_mask"], strict=True)
    ]


def single(model, prompt: list[int], **arguments) -> list[int]:
    ids = torch.tensor([prompt])
    if "generation_config" not in arguments:
        arguments = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": PAD, **arguments}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **arguments)[0, len(prompt) :].tolist()


def test_greedy_completions_are_those_of_single_calls(model, tokenizer):
    """Token for token, in the order of the prompts, with the end token and nothing behind it."""
    rows = completed(model, tokenizer)
    expected = [single(model, prompt) for prompt in PROMPTS]
    # The test would show less if all texts ended alike.
    assert len({len(completion) for completion in expected}) > 1
    assert any(completion[-1] == EOS for completion in expected) and any(EOS not in c for c in expected)
    assert completions(rows) == expected
    for row, prompt in zip(rows, PROMPTS, strict=True):
        assert row["input_ids"][: len(prompt)] == prompt
        assert row["completion_mask"][: len(prompt)] == [0] * len(prompt)


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_greedy_text_does_not_depend_on_the_batch(model, tokenizer, batch_size):
    """Padding changes nothing."""
    assert completed(model, tokenizer, batch_size=batch_size).to_dict() == completed(model, tokenizer).to_dict()


def test_prompts_may_be_text(model, tokenizer):
    """The same as their token ids."""
    words = ["a b c", "d", "e f g h"]
    ids = tokenizer(words)["input_ids"]
    assert completed(model, tokenizer, words).to_dict() == completed(model, tokenizer, ids).to_dict()


@pytest.mark.parametrize(
    "ends",
    [
        {"eos_token_id": 9},
        {"eos_token_id": [9, EOS]},
        {"eos_token_id": None},
        {"generation_config": GenerationConfig(eos_token_id=9, max_new_tokens=12)},
    ],
    ids=["token", "several", "none", "configuration"],
)
def test_other_end_tokens_end_a_text(model, tokenizer, ends):
    """However `generate` is told of them."""
    found = completions(completed(model, tokenizer, **ends))
    assert found == [single(model, prompt, **ends) for prompt in PROMPTS]
    assert len({len(completion) for completion in found}) > 1 or ends == {"eos_token_id": None}


@pytest.mark.parametrize("padding", ["<pad>", "<eos>"])
def test_a_stop_string_ends_a_text(model, padding):
    """What follows in the batch is padding and no text, whatever token that is."""
    # Stop strings need a tokenizer that can write any text: one token per letter and no spaces.
    letters = Tokenizer(models.BPE(tiny_tokenizer().get_vocab(), merges=[]))
    letters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, pad_token=padding, eos_token="<eos>")
    word = tokenizer.decode([completions(completed(model, tokenizer))[0][1]])
    found = completions(completed(model, tokenizer, stop_strings=[word]))
    assert found == [single(model, prompt, stop_strings=[word], tokenizer=tokenizer) for prompt in PROMPTS]
    assert len({len(completion) for completion in found}) > 1
    config = GenerationConfig(max_new_tokens=12, stop_strings=[word])
    assert completions(completed(model, tokenizer, generation_config=config)) == found


def test_a_stopping_criterion_ends_a_text(model, tokenizer):
    """One of the caller's own, which says for each row when it is enough."""

    class AfterASmallToken(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return input_ids[:, -1] < 8

    arguments = {"stopping_criteria": StoppingCriteriaList([AfterASmallToken()])}
    found = completions(completed(model, tokenizer, **arguments))
    assert found == [single(model, prompt, **arguments) for prompt in PROMPTS]
    assert len({len(completion) for completion in found}) > 1


def test_a_generation_config_is_followed(model, tokenizer):
    """Also where it asks for sampling, and it isn't changed."""
    config = GenerationConfig(max_new_tokens=6, do_sample=True, temperature=1.5)
    before = config.to_dict()
    rows = completed(model, tokenizer, generation_config=config)
    same = completed(model, tokenizer, max_new_tokens=6, do_sample=True, temperature=1.5)
    assert rows.to_dict() == same.to_dict()
    assert rows.to_dict() != completed(model, tokenizer, max_new_tokens=6).to_dict()
    assert config.to_dict() == before


def test_an_end_token_that_pads_is_kept_once(model):
    """Where a tokenizer pads with its end token, as many do."""
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    assert completions(completed(model, tokenizer)) == [single(model, prompt) for prompt in PROMPTS]


@pytest.mark.parametrize(
    "sampling", [{}, {"do_sample": True, "temperature": 1.3, "seed": 3}], ids=["greedy", "sampled"]
)
@pytest.mark.parametrize("kept", [0, 1, 2])
def test_an_interrupted_run_goes_on_to_the_same_text(model, tokenizer, tmp_path, kept, sampling):
    """From a file that ends anywhere in a line, whatever random numbers were drawn meanwhile."""
    path = tmp_path / "text.jsonl"
    whole = completed(model, tokenizer, **sampling)
    assert completed(model, tokenizer, output_file=path, **sampling).to_dict() == whole.to_dict()
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 3
    path.write_text("".join(lines[: 1 + kept]) + lines[1 + kept][:9])
    torch.rand(5)
    assert completed(model, tokenizer, output_file=path, **sampling).to_dict() == whole.to_dict()
    assert path.read_text() == "".join(lines)


def test_finished_batches_are_not_generated_again(model, tokenizer, tmp_path):
    """They are read: what the file says is what comes out."""
    path = tmp_path / "text.jsonl"
    completed(model, tokenizer, output_file=path)
    header, *batches = path.read_text().splitlines()
    batches = [json.loads(batch) for batch in batches]
    batches[0]["completions"][0] = [4, 4, 4]
    path.write_text("\n".join([header, *map(json.dumps, batches)]) + "\n")
    assert completions(completed(model, tokenizer, output_file=path))[1] == [4, 4, 4]


def test_a_folder_for_the_file_is_made(model, tokenizer, tmp_path):
    """With all its parents."""
    completed(model, tokenizer, output_file=tmp_path / "new" / "deep" / "text.jsonl")
    assert (tmp_path / "new" / "deep" / "text.jsonl").exists()


@pytest.mark.parametrize(
    "changed",
    [{"max_new_tokens": 9}, {"seed": 1}, {"batch_size": 2}, {"do_sample": True}, {"prompts": [*PROMPTS[:-1], [10]]}],
    ids=lambda changed: next(iter(changed)),
)
def test_a_file_of_another_run_is_refused(model, tokenizer, tmp_path, changed):
    """Other arguments or other prompts would mix two texts; the file stays as it is."""
    path = tmp_path / "text.jsonl"
    completed(model, tokenizer, output_file=path)
    before = path.read_text()
    with pytest.raises(ValueError, match="other arguments"):
        completed(model, tokenizer, **{"output_file": path, **changed})
    assert path.read_text() == before


def test_a_file_of_another_model_is_refused(tokenizer, tmp_path):
    """Two models' texts would mix; both are named, and the file stays as it is."""
    path = tmp_path / "text.jsonl"
    model = often_ending(tiny_lm(seed=4))
    model.config.name_or_path = "first"
    completed(model, tokenizer, output_file=path)
    before = path.read_text()
    other = often_ending(tiny_lm(seed=5))
    other.config.name_or_path = "second"
    with pytest.raises(
        ValueError, match=r"another model \('first' with weights \w{16}\) than .* \('second' with weights"
    ):
        completed(other, tokenizer, output_file=path)
    with pytest.raises(ValueError, match="another model"):
        completed(model.bfloat16(), tokenizer, output_file=path)
    assert path.read_text() == before


def test_the_same_model_goes_on_from_elsewhere(model, tokenizer, tmp_path):
    """Saved under another name, or with an adapter out of use: its weights are the same, and so is its text."""
    path = tmp_path / "text.jsonl"
    expected = completed(model, tokenizer, output_file=path)
    model.save_pretrained(tmp_path / "moved")
    moved = AutoModelForCausalLM.from_pretrained(tmp_path / "moved")
    assert completed(moved, tokenizer, output_file=path).to_dict() == expected.to_dict()
    adapted = get_peft_model(moved, gated())
    with adapted.disable_adapter():
        assert completed(adapted, tokenizer, output_file=path).to_dict() == expected.to_dict()


def test_a_file_that_names_no_model_goes_on(model, tokenizer, tmp_path):
    """Those of earlier versions, with the text that they hold."""
    path = tmp_path / "text.jsonl"
    expected = completed(model, tokenizer, output_file=path)
    header, *batches = path.read_text().splitlines(keepends=True)
    arguments = json.loads(header)
    del arguments["model"]
    path.write_text("".join([json.dumps(arguments, sort_keys=True) + "\n", *batches[:1]]))
    assert completed(model, tokenizer, output_file=path).to_dict() == expected.to_dict()


@pytest.mark.parametrize("content", ["", "half a li", "no header\n", "[1]\n", "{}\n"])
def test_a_file_of_something_else_is_refused(model, tokenizer, tmp_path, content):
    """It stays as it is."""
    path = tmp_path / "text.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"other arguments \(nothing readable\)"):
        completed(model, tokenizer, output_file=path)
    assert path.read_text() == content


@pytest.mark.parametrize(
    ("prompts", "named"),
    [([], "`prompts`"), ([[4], [], [5], []], r"\[1, 3\]"), (["a b", ""], r"\[1\]")],
    ids=["none", "ids", "text"],
)
def test_an_empty_prompt_is_refused(model, tokenizer, prompts, named):
    """By its place."""
    with pytest.raises(ValueError, match=named):
        completed(model, tokenizer, prompts)


def test_a_batch_size_of_nothing_is_refused(model, tokenizer):
    """Zero and below."""
    for batch_size in (0, -1):
        with pytest.raises(ValueError, match="`batch_size`"):
            completed(model, tokenizer, batch_size=batch_size)


def test_sampled_text_leaves_random_numbers_alone(model, tokenizer):
    """Those of the caller go on as if nothing had been drawn; another seed gives another text."""
    torch.manual_seed(0)
    expected = torch.rand(4)
    torch.manual_seed(0)
    one = completed(model, tokenizer, do_sample=True)
    assert torch.equal(torch.rand(4), expected)
    assert completed(model, tokenizer, do_sample=True).to_dict() == one.to_dict()
    assert completed(model, tokenizer, do_sample=True, seed=10).to_dict() != one.to_dict()


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(tokenizer, training):
    """In training or evaluation mode; the text is that of evaluation."""
    model = tiny_lm(attention_dropout=0.5).train(training)
    rows = completed(model, tokenizer)
    assert model.training == training
    assert rows.to_dict() == completed(model.eval(), tokenizer).to_dict()


def test_a_model_with_its_adapter_out_of_use_says_the_same(model, tokenizer):
    """The same text as without the adapter."""
    expected = completed(model, tokenizer)
    adapted = get_peft_model(often_ending(tiny_lm(seed=4)), gated())
    randomise(adapted)
    with adapted.disable_adapter():
        assert completed(adapted, tokenizer).to_dict() == expected.to_dict()


def test_the_rows_are_what_the_trainer_takes(model, tokenizer, tmp_path):
    """Masks stand from the last token of each prompt on."""
    rows = completed(model, tokenizer)
    trainer = tiny_trainer(tmp_path, model=tiny_lm(), train_dataset=rows, anchors_per_sequence=100)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(PROMPTS))])
    anchors = trainer._draw_anchors(batch, step=0)
    for row, prompt, completion in zip(anchors, PROMPTS, completions(rows), strict=True):
        assert row[row >= 0].tolist() == list(range(len(prompt) - 1, len(prompt) - 1 + len(completion)))
    trainer.train()
    assert torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry]).isfinite().all()
