"""Rows that the trainer of nested experts takes, and those that it refuses before it changes anything."""

import pytest
from datasets import Dataset, DatasetDict
from peft import LoraConfig

from dynamoe.training.setting import nested, settings, texts, tiny_tokenizer, tiny_trainer
from hf_ext import DynaMoeTrainer


UNREADABLE = {"label": [3, 4], "content": ["w3 w4", "w5 w6"]}


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        (UNREADABLE, r"only \['label', 'content'\]"),
        ({"prompt": ["w3"], "text": ["w4 w5"]}, r"`prompt` with `completion`\), only \['prompt', 'text'\]"),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_rows_without_text_are_named_with_the_way_out(tmp_path, columns, found, streamed):
    """Those to train on and each set to evaluate on."""
    rows = Dataset.from_dict(columns)
    rows = rows.to_iterable_dataset() if streamed else rows
    for name, given in (
        ("`train_dataset`", {"train_dataset": rows}),
        ("`eval_dataset`", {"eval_dataset": rows}),
        (r"`eval_dataset\['b'\]`", {"eval_dataset": {"a": texts(2), "b": rows}}),
    ):
        with pytest.raises(ValueError, match=rf"{name} has none of the columns.*{found}.*`dataset_text_field`"):
            tiny_trainer(tmp_path, **given)


def test_rows_to_evaluate_on_that_come_later_are_looked_at_too(tmp_path):
    trainer = tiny_trainer(tmp_path)
    with pytest.raises(ValueError, match="`eval_dataset` has none of the columns"):
        trainer.evaluate(Dataset.from_dict(UNREADABLE))


def test_no_adapter_is_put_onto_a_model_whose_rows_are_refused(tmp_path):
    """A second try would put another one on top."""
    model = nested()
    names = list(model.state_dict())
    with pytest.raises(ValueError, match="`train_dataset` has none"):
        tiny_trainer(
            tmp_path,
            model=model,
            train_dataset=Dataset.from_dict(UNREADABLE),
            peft_config=LoraConfig(r=2, target_modules=["up_proj"]),
        )
    assert list(model.state_dict()) == names


def test_what_is_no_dataset_or_has_no_rows_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`train_dataset` has no rows"):
        tiny_trainer(tmp_path, train_dataset=Dataset.from_dict({"text": []}))
    with pytest.raises(TypeError, match=r"`train_dataset` must be a dataset, got list.*Dataset\.from_list"):
        tiny_trainer(tmp_path, train_dataset=["w3 w4"])
    with pytest.raises(TypeError, match=r"`train_dataset` holds the splits \['test', 'train'\]: give one of them"):
        tiny_trainer(tmp_path, train_dataset=DatasetDict({"train": texts(2), "test": texts(2)}))


def test_text_of_another_column_is_read_where_it_is_named_or_made(tmp_path):
    rows = Dataset.from_dict(UNREADABLE)
    named = tiny_trainer(tmp_path, train_dataset=rows, dataset_text_field="content")
    made = DynaMoeTrainer(
        model=nested(),
        args=settings(tmp_path),
        train_dataset=rows,
        processing_class=tiny_tokenizer(),
        formatting_func=lambda row: row["content"],
    )
    for trainer in (named, made):
        assert [ids[:2] for ids in trainer.train_dataset["input_ids"]] == [[3, 4], [5, 6]]


@pytest.mark.parametrize(
    "columns", [{"prompt": ["w2 w3 w4 w5 w6"], "completion": [" w7"]}, {"input_ids": [[], []]}], ids=["cut", "empty"]
)
def test_rows_of_which_nothing_is_left_are_refused(tmp_path, columns):
    """When the trainer is made, and not by a sampler without samples."""
    with pytest.raises(ValueError, match=r"`train_dataset` has no row with a token.*`max_length`=4 cuts"):
        tiny_trainer(tmp_path, train_dataset=Dataset.from_dict(columns), max_length=4)
