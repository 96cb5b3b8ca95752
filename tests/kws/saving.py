"""What a model has to be after it was saved and loaded."""

import torch


def assert_same_model(loaded, model, inputs):
    """The same weights, and logits that are the same but for rounding, bit for bit where weights lie alike in memory."""
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name
    logits = model(**inputs).logits
    torch.testing.assert_close(loaded(**inputs).logits, logits)
    # A file's tensors begin at any address, where kernels may sum in another order.
    for parameter in loaded.parameters():
        parameter.data = parameter.data.clone()
    torch.testing.assert_close(loaded(**inputs).logits, logits, rtol=0, atol=0)
