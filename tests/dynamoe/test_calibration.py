"""The text that neurons are ranked on: every form of it, cut to what is asked for and to what the model takes."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from dynamoe.models import random_ids, tiny_model
from hf_ext import convert_to_dynamoe, shipped_model
from hf_ext.dynamoe.calibration import calibration_batches


TEXTS = ["Once upon a time there was a cat.", "The sun was warm and the bird was happy.", "One day the cat ran away."]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(shipped_model("tiny-lm"))
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return tokenizer


def rows_of(batches):
    """Token lists without padding, in no order."""
    return sorted(
        ids[: int(mask.sum())].tolist()
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    )


def batches_of(dataset, tokenizer, num_tokens=1000, batch_size=2, max_length=1000, **config):
    return calibration_batches(
        dataset, tokenizer, num_tokens, batch_size, max_length, tiny_model(vocab_size=512, **config).config
    )


def test_every_form_of_text_is_read_alike(tokenizer):
    """Strings, columns of text and tokens, conversations, a data set, one that is streamed."""
    expected = sorted(tokenizer(text)["input_ids"] for text in TEXTS)
    messages = [[{"role": "user", "content": text}] for text in TEXTS]
    forms = [
        TEXTS,
        [{"text": text} for text in TEXTS],
        Dataset.from_dict({"text": TEXTS}),
        Dataset.from_dict({"text": TEXTS}).to_iterable_dataset(),
        Dataset.from_dict({"input_ids": [tokenizer(text)["input_ids"] for text in TEXTS]}),
        (text for text in TEXTS),
    ]
    for form in forms:
        assert rows_of(batches_of(form, tokenizer)) == expected
    chats = rows_of(batches_of(Dataset.from_dict({"messages": messages}), tokenizer))
    for ids, text in zip(sorted(chats), sorted(TEXTS, key=lambda t: tokenizer(t)["input_ids"]), strict=True):
        assert text.replace(" ", "") in tokenizer.decode(ids).replace(" ", "")


def test_no_more_text_is_read_than_asked_for(tokenizer):
    """Tokens in all, tokens of a row, positions of the model; an endless stream ends."""

    def endless():
        while True:
            yield TEXTS[0]

    assert sum(map(len, rows_of(batches_of(endless(), tokenizer, num_tokens=50)))) in (49, 50)
    assert max(map(len, rows_of(batches_of(TEXTS, tokenizer, max_length=5)))) == 5
    assert max(map(len, rows_of(batches_of(TEXTS, tokenizer, max_position_embeddings=4)))) == 4
    assert [len(batch["input_ids"]) for batch in batches_of(TEXTS, tokenizer)] == [2, 1]


def test_batches_and_padding_do_not_change_the_order():
    rows = [{"input_ids": random_ids(length, seed=length).tolist()} for length in (4, 9, 16, 30)]
    for importance in ("activation_norm", "taylor"):
        weights = []
        for batch_size in (1, 2, 4):
            moe = convert_to_dynamoe(
                tiny_model(),
                3,
                calibration_dataset=rows,
                batch_size=batch_size,
                importance=importance,
                disable_tqdm=True,
            )
            weights.append(moe.nested_mlps()[1].dense.up_proj.weight)
        assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])


def test_the_receipt_says_what_was_done():
    rows = [{"input_ids": random_ids(length).tolist()} for length in (4, 9)]
    moe = convert_to_dynamoe(tiny_model(), 3, calibration_dataset=rows, importance="activation", disable_tqdm=True)
    receipt = moe.conversion_receipt
    assert (receipt.expert_widths, receipt.importance, receipt.calibration_tokens) == ([8, 16, 24], "activation", 13)
    assert all(0 < a < b < c == 1 for a, b, c in receipt.importance_shares)
    assert receipt.router_parameters == sum(p.numel() for n, p in moe.named_parameters() if ".router." in n)
    assert moe.config.conversion["calibration_tokens"] == 13
    moe = convert_to_dynamoe(tiny_model(), 3, calibration_dataset=rows, importance="none", disable_tqdm=True)
    assert moe.conversion_receipt.calibration_tokens == 0
