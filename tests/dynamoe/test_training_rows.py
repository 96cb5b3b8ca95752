"""Rows that TRL would end in an error of its own on are named by the commands before anything is trained."""

import pytest
import typer

from hf_ext.cli.training_rows import check_texts, check_tokens


datasets = pytest.importorskip("datasets")

TALK = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"text": ["a", None]}, "row 1 of the dataset has no text, its `text` is None"),
        ({"text": [["a", "b"]]}, "row 0 of the dataset has no text"),
        (
            {"prompt": ["a", "b"], "completion": ["c", None]},
            "row 1 of the dataset has no text, its `completion` is None",
        ),
        ({"messages": [TALK, []]}, r"row 1 of the dataset has no conversation, its `messages` is \[\]"),
        ({"messages": [TALK, None]}, "row 1 of the dataset has no conversation, its `messages` is None"),
        ({"conversations": ["hello"]}, "row 0 of the dataset has no conversation, its `conversations` is 'hello'"),
    ],
)
def test_a_row_without_text_is_named(columns, said):
    with pytest.raises(typer.BadParameter, match=said):
        check_texts(datasets.Dataset.from_dict(columns))


@pytest.mark.parametrize(
    "columns",
    [
        {"text": ["a", ""]},
        {"prompt": [TALK], "completion": [TALK]},
        {"messages": [TALK], "text": [None]},
        {"prompt": ["a"], "completion": ["b"], "text": [None]},
        {"input_ids": [[1, 2]], "text": [None]},
    ],
)
def test_columns_that_are_not_read_may_be_empty(columns):
    check_texts(datasets.Dataset.from_dict(columns))


@pytest.mark.parametrize("ids", [None, "abc", [1.5, 2.0]])
def test_tokens_that_are_none_are_named(ids):
    with pytest.raises(typer.BadParameter, match="row 0 of the dataset has `input_ids` that are no list of tokens"):
        check_tokens(datasets.Dataset.from_dict({"input_ids": [ids]}), 9)
