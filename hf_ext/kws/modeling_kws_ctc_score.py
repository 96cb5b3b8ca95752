"""How well a phrase's phonemes can be read in a clip, and how many there are, from a CTC head alone."""

import torch


def ctc_phrase_scores(
    log_probs: torch.Tensor, mask: torch.Tensor, phonemes: torch.Tensor, phoneme_mask: torch.Tensor
) -> torch.Tensor:
    """
    What it costs to read each phrase somewhere in each clip, instead of what the frames say by themselves.

    The phrase may begin and end anywhere: frames before and behind it cost nothing, and a frame of it costs by how much its
    symbol is less likely than the likeliest one. The cheapest alignment counts (Viterbi), divided by the number of phonemes.

    Args:
        log_probs (`torch.Tensor` of shape `(batch_size, frames, vocab_size)`):
            Log probabilities of a CTC head, whose blank is symbol 0.
        mask (`torch.Tensor` of shape `(batch_size, frames)`):
            True for frames that are no padding.
        phonemes (`torch.Tensor` of shape `(num_phrases, num_phonemes)` or `(batch_size, 1, num_phonemes)`):
            The phrases, for every clip or one for each.
        phoneme_mask (`torch.Tensor` of the shape of `phonemes`):
            True for phonemes that are no padding, which is on the right.

    Returns:
        `torch.Tensor` of shape `(batch_size, num_phrases)`: 0 where the likeliest symbols spell the phrase, and below
        elsewhere. A clip with fewer frames than the phrase needs gets the cost of a symbol that is never heard.
    """
    batch = len(log_probs)
    costs = log_probs - log_probs.amax(-1, keepdim=True)
    phonemes, phoneme_mask = (x.expand(batch, *x.shape[-2:]) for x in (phonemes, phoneme_mask))
    # One state for each phoneme and a blank before all but the first: P1 blank P2 blank P3 ...
    symbols = torch.stack([torch.zeros_like(phonemes), phonemes], dim=-1).flatten(-2)[..., 1:]
    never = costs.new_tensor(-1e4)
    # Two that are alike need the blank between them.
    skips = torch.zeros_like(symbols, dtype=torch.bool)
    skips[..., 2::2] = phonemes[..., 1:] != phonemes[..., :-1]
    last = 2 * phoneme_mask.sum(-1, keepdim=True) - 2
    state = costs.new_full(symbols.shape, -1e4)
    best = costs.new_full(last.shape, -1e4)
    for frame, inside in zip(costs.unbind(1), mask.unbind(1), strict=True):
        # To stay, to come from the state before, to leave out a blank, or to begin here.
        before = torch.cat([torch.zeros_like(state[..., :1]), state[..., :-1]], dim=-1)
        skipped = torch.cat([never.expand(state[..., :2].shape), state[..., :-2]], dim=-1)[..., : state.shape[-1]]
        arrived = torch.maximum(torch.maximum(state, before), skipped.where(skips, never))
        heard = frame.gather(-1, symbols.flatten(1)).view_as(symbols)
        state = (arrived + heard).where(inside[:, None, None], state).clamp(min=-1e4)
        ended = state.gather(-1, last.clamp(min=0))
        best = torch.maximum(best, ended)
    return best[..., 0] / phoneme_mask.sum(-1).clamp(min=1)


def ctc_symbols_heard(log_probs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    How many symbols the likeliest ones of the frames spell, repetitions and blanks left out.

    Args:
        log_probs (`torch.Tensor` of shape `(batch_size, frames, vocab_size)`):
            Log probabilities of a CTC head, whose blank is symbol 0.
        mask (`torch.Tensor` of shape `(batch_size, frames)`):
            True for frames that are no padding.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`.
    """
    heard = log_probs.argmax(-1).masked_fill(~mask, 0)
    before = torch.nn.functional.pad(heard, (1, 0))[:, :-1]
    return ((heard != before) & (heard != 0)).sum(-1)
