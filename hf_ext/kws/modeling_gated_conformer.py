"""
Keywords and their places in running audio, by [a conformer whose modules are left out where nothing is
said](https://huggingface.co/papers/2309.00140).
"""

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.utils import can_return_tuple

from .configuration_gated_conformer import FRAMES_PER_STEP, LEAST_FRAMES, GatedConformerConfig
from .modeling_gated_conformer_layers import (
    MODULES_PER_LAYER,
    GatedConformerGates,
    GatedConformerLayer,
    GatedConformerSubsampling,
)
from .modeling_gated_conformer_losses import expected_work, keyword_losses
from .modeling_gated_conformer_outputs import (
    DetectedKeyword,
    GatedConformerMacs,
    GatedConformerOutput,
    GatedConformerStreamState,
    without_repeats,
)
from .modeling_kws_base import KwsPreTrainedModel


def log_odds(probability: float) -> float:
    if probability in (0, 1):
        return math.inf if probability else -math.inf
    return math.log(probability / (1 - probability))


class GatedConformerPreTrainedModel(KwsPreTrainedModel):
    config: GatedConformerConfig
    base_model_prefix = "gated_conformer"
    _no_split_modules = ["GatedConformerLayer"]

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, GatedConformerGates):
            # Every gate begins with the same probability, whatever it sees.
            odds = log_odds(self.config.gate_open_probability)
            init.zeros_(module.weight)
            init.copy_(module.bias, torch.tensor([odds / 2, -odds / 2] * MODULES_PER_LAYER))
        else:
            super()._init_weights(module)


class GatedConformerForKeywordDetection(GatedConformerPreTrainedModel):
    """
    Whether, which and where: a keyword of a closed set in each window of the audio, by a conformer whose modules run only
    where their gates are open.

    Clips are cut into windows of 120 frames, and so are streams: [`~GatedConformerForKeywordDetection.stream`] gives the
    windows of the whole, however the frames come in. Each window goes through the blocks by itself, each module with a gate
    of its own, as in the paper; the encoder's entrance is computed once for all windows. All windows of a clip are a batch: an
    hour of audio is best streamed, in chunks as large as memory allows.

    In training every module runs and is multiplied by its gate. At inference (`model.eval()`) modules whose gate is closed
    are not run, so that the clock follows the gates, in batches too.

    The loss joins four: whether the window holds a keyword, which one and where (of windows that hold one), and how many
    modules run.

    Args:
        config ([`GatedConformerConfig`]):
            The dimensions, the gates and the weights of the losses.

    Example:

    ```python
    >>> import torch
    >>> from hf_ext import GatedConformerConfig, GatedConformerForKeywordDetection

    >>> model = GatedConformerForKeywordDetection(GatedConformerConfig(num_labels=10)).eval()
    >>> features = torch.zeros(1, 200, 40)  # two seconds
    >>> output = model(features)
    >>> output.logits.shape, output.detection_logits.shape, output.gates.shape
    (torch.Size([1, 10]), torch.Size([1, 11]), torch.Size([1, 11, 16]))

    >>> state = model.start_stream()
    >>> for chunk in features.split(50, dim=1):
    ...     output, state = model.stream(chunk, state)
    ...     print(output.window_starts.tolist())
    []
    []
    [0, 8, 16, 24]
    [32, 40, 48, 56, 64, 72, 80]
    ```
    """

    def __init__(self, config: GatedConformerConfig) -> None:
        super().__init__(config)
        size = config.hidden_size
        self.subsampling = GatedConformerSubsampling(config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.layers = nn.ModuleList([GatedConformerLayer(config) for _ in range(config.num_hidden_layers)])
        self.detection_head = nn.Linear(size, 1)
        self.classifier = nn.Linear(size, config.num_labels)
        self.location_head = nn.Linear(size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_features: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        detection_targets: torch.Tensor | None = None,
        location_targets: torch.Tensor | None = None,
        gated: bool = True,
        gate_threshold: float | None = None,
        **kwargs: Any,
    ) -> GatedConformerOutput:
        """
        Args:
            input_features (`torch.Tensor` of shape `(batch_size, num_frames, num_mel_bins)`):
                Features of the clips, padded on the right. Clips longer than a window have several, every `hop_frames`, as far
                as they are complete; shorter ones have one.
            attention_mask (`torch.Tensor` of shape `(batch_size, num_frames)`, *optional*):
                1 for frames that are no padding.
            labels (`torch.Tensor` of shape `(batch_size,)` or `(batch_size, num_windows)`, *optional*):
                The keyword of each window; -100 for none. One per clip if all have one window.
            detection_targets (`torch.Tensor` of the shape of `labels`, *optional*):
                From 0 to 1, how much a window counts as holding its keyword; -100 for windows to leave out, such as those
                with a keyword at the edge. By default 1 where there is a label and 0 where there is none.
            location_targets (`torch.Tensor` of the shape of `labels` and two values each, *optional*):
                From the centre of the window to that of the keyword, and the keyword's length; both in windows. Only those of
                windows with a label count.
            gated (`bool`, *optional*, defaults to `True`):
                Whether the gates are asked. Without them every module runs, in training (which begins so in the paper) and at
                inference, and there is no loss of the gates.
            gate_threshold (`float`, *optional*):
                Probability above which a module runs at inference; the configuration's by default.

        Returns:
            [`GatedConformerOutput`]

        Raises:
            ValueError: if features have another number of channels, targets another shape or come without labels, or a label
                is none of the model's; if the threshold is out of range or the mask is of other frames.
        """
        self._check_features(input_features)
        frames = input_features.shape[1]
        num_frames = torch.full((len(input_features),), frames, device=input_features.device)
        if attention_mask is not None:
            if attention_mask.shape != input_features.shape[:2]:
                raise ValueError(
                    f"`attention_mask` has the shape {tuple(attention_mask.shape)} and `input_features` has "
                    f"{tuple(input_features.shape[:2])} frames: one value for each."
                )
            # What stands in the padding must not reach the first step of a clip of a few frames.
            input_features = input_features * attention_mask[..., None].to(input_features.dtype)
            num_frames = attention_mask.sum(-1)
        if frames < LEAST_FRAMES:
            input_features = F.pad(input_features, (0, 0, 0, LEAST_FRAMES - frames))
        steps = self.subsampling(input_features)
        num_steps = self.config.num_steps(num_frames.clamp(min=LEAST_FRAMES))
        output = self._windows(steps, num_steps, gated, gate_threshold)
        if labels is None and (detection_targets is not None or location_targets is not None):
            raise ValueError(
                "`detection_targets` and `location_targets` need `labels`, which say the keyword of each window."
            )
        if labels is not None:
            losses = keyword_losses(output, labels, detection_targets, location_targets)
            macs = self.count_macs().modules if self.config.gate_cost == "macs" else None
            losses["gate_loss"] = expected_work(output, labels, macs, self.config.gate_noise_factor)
            weights = {name: getattr(self.config, f"{name}_weight") for name in losses}
            weights["gate_loss"] *= gated
            losses["loss"] = torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()
            output = GatedConformerOutput(**{**output, **losses})
        return output

    def start_stream(self, batch_size: int = 1) -> GatedConformerStreamState:
        """
        The state that [`~GatedConformerForKeywordDetection.stream`] begins with.

        Args:
            batch_size (`int`, *optional*, defaults to `1`):
                Streams that go side by side.

        Returns:
            [`GatedConformerStreamState`]
        """
        weight = self.subsampling.proj.weight
        return GatedConformerStreamState(
            frames=weight.new_zeros(batch_size, 0, self.config.num_mel_bins),
            steps=weight.new_zeros(batch_size, 0, self.config.hidden_size),
        )

    @torch.no_grad()
    def stream(
        self,
        input_features: torch.Tensor,
        state: GatedConformerStreamState,
        final: bool = False,
        gated: bool = True,
        gate_threshold: float | None = None,
    ) -> tuple[GatedConformerOutput, GatedConformerStreamState]:
        """
        The windows that are complete with these frames. All calls together give the windows of the whole.

        Args:
            input_features (`torch.Tensor` of shape `(batch_size, num_frames, num_mel_bins)`):
                The next frames of each stream, of any number; none is fine.
            state ([`GatedConformerStreamState`]):
                What [`~GatedConformerForKeywordDetection.start_stream`] or the last call returned.
            final (`bool`, *optional*, defaults to `False`):
                Whether the streams end with these frames. If they were shorter than a window, they have one after all.
            gated (`bool`, *optional*, defaults to `True`), gate_threshold (`float`, *optional*):
                As for clips.

        Returns:
            `tuple[GatedConformerOutput, GatedConformerStreamState]`: as for clips, `logits` being `None` where no window became
            complete, and the state for the next call.

        Raises:
            ValueError: as for clips, and if the streams have ended, are others than the state's, or the model is in training
                mode.
        """
        if self.training:
            raise ValueError("Streams have no gradients and no dropout: call `model.eval()` first.")
        if state.finished:
            raise ValueError("These streams have ended (`final=True`): begin others with `start_stream`.")
        self._check_features(input_features, len(state.frames))
        frames = torch.cat([state.frames, input_features.to(state.frames)], dim=1)
        is_short = final and not state.num_windows and not state.steps.shape[1] and frames.shape[1] < LEAST_FRAMES
        if is_short:
            frames = F.pad(frames, (0, 0, 0, LEAST_FRAMES - frames.shape[1]))
        steps, to_skip = state.steps, state.num_skipped
        if frames.shape[1] >= LEAST_FRAMES:
            new_steps = self.subsampling(frames)
            frames = frames[:, FRAMES_PER_STEP * new_steps.shape[1] :].clone()
            steps = torch.cat([steps, new_steps[:, to_skip:]], dim=1)
            to_skip = max(to_skip - new_steps.shape[1], 0)
        is_complete = steps.shape[1] >= self.config.window_steps or (final and not state.num_windows)
        num_steps = torch.full((len(steps),), steps.shape[1] if is_complete else 0, device=steps.device)
        output = self._windows(steps[:, : int(num_steps[0])], num_steps, gated, gate_threshold)
        num_new = len(output.window_starts)
        output.window_starts = output.window_starts + state.num_windows * self.config.hop_frames
        passed = num_new * self.config.hop_steps
        new_state = GatedConformerStreamState(
            frames=frames,
            steps=steps[:, passed:].clone(),
            # Where windows are farther apart than they are long, steps to come are of none.
            num_skipped=to_skip + max(passed - steps.shape[1], 0),
            num_windows=state.num_windows + num_new,
            finished=final,
        )
        return output, new_state

    @torch.no_grad()
    def locate(
        self, output: GatedConformerOutput, threshold: float = 0.5, max_iou: float = 0.5
    ) -> list[list[DetectedKeyword]]:
        """
        The keywords of each clip, and where they are.

        Args:
            output ([`GatedConformerOutput`]):
                Of clips, or of a call of [`~GatedConformerForKeywordDetection.stream`].
            threshold (`float`, *optional*, defaults to `0.5`):
                Least score, the probability that the window holds a keyword times that of this one.
            max_iou (`float`, *optional*, defaults to `0.5`):
                Of intervals of the same keyword that overlap by more than this share of their union, the one with the
                highest score is kept.

        Returns:
            `list[list[DetectedKeyword]]`: for each clip what was found, in the order of the starts.
        """
        classes = output.class_logits.float().softmax(-1)
        scores, labels = (output.detection_logits.float().sigmoid()[..., None] * classes).max(-1)
        centre = output.window_starts + self.config.window_frames * (0.5 + output.locations[..., 0].float())
        # A keyword has at least one step.
        half = (self.config.window_frames * output.locations[..., 1].float()).clamp(min=FRAMES_PER_STEP) / 2
        found = []
        for row in range(len(scores)):
            windows = ((scores[row] >= threshold) & output.window_mask[row]).nonzero()[:, 0]
            columns = (scores[row], labels[row], (centre - half)[row], (centre + half)[row])
            rows = zip(*(column[windows].tolist() for column in columns), strict=True)
            keywords = [DetectedKeyword(self.config.id2label[k], score, a, b) for score, k, a, b in rows]
            found.append(sorted(without_repeats(keywords, max_iou), key=lambda keyword: keyword.start))
        return found

    def count_macs(self) -> GatedConformerMacs:
        """
        Multiply-accumulates of one window: of each gated module, and of what always runs.

        They are those of matrix products and convolutions; norms, biases and activations are left out.

        Returns:
            [`GatedConformerMacs`]
        """
        config = self.config
        size, steps = config.hidden_size, config.window_steps
        distances = 2 * steps - 1
        feed_forward = 2 * steps * size * config.intermediate_size
        # Four projections of states and one of distances; products with keys, distances and values.
        attention = (4 * steps + distances) * size**2 + (2 * steps + distances) * steps * size
        convolution = 3 * steps * size**2 + steps * size * config.conv_kernel_size
        layer = (feed_forward, attention, convolution, feed_forward)
        frames = (config.window_frames - 1) // 2
        entrance = frames * 3 * config.num_mel_bins * size + steps * (3 * size + size**2)
        # The gates of a block, and the mean that they look at, are computed anew behind each of its modules.
        gates = config.num_hidden_layers * MODULES_PER_LAYER * size * (2 * MODULES_PER_LAYER + steps)
        heads = size * (3 + config.num_labels)
        return GatedConformerMacs(layer * config.num_hidden_layers, entrance + gates + heads)

    def _windows(
        self, steps: torch.Tensor, num_steps: torch.Tensor, gated: bool, threshold: float | None
    ) -> GatedConformerOutput:
        """The output of each window of these steps, of which the first `num_steps` of each row are no padding."""
        config = self.config
        threshold = config.gate_threshold if threshold is None else threshold
        if not 0 <= threshold <= 1:
            raise ValueError(f"`gate_threshold` must be from 0 to 1, got {threshold}: gates have probabilities.")
        least_odds = log_odds(threshold)
        length = min(steps.shape[1], config.window_steps)
        num_windows = 1 + (steps.shape[1] - length) // config.hop_steps if length else 0
        starts = config.hop_steps * torch.arange(num_windows, device=steps.device)
        row_windows = 1 + (num_steps - config.window_steps).clamp(min=0) // config.hop_steps
        window_mask = torch.arange(num_windows, device=steps.device) < row_windows[:, None]
        places = starts[:, None] + torch.arange(length, device=steps.device)
        # All windows that are no padding stand below one another, whichever clip they are of.
        windows = steps.unfold(1, length, config.hop_steps)[:, :num_windows].transpose(2, 3)
        hidden = self.dropout(windows[window_mask])
        mask = (places < num_steps[:, None, None])[window_mask]
        averaging = (mask / mask.sum(1, keepdim=True))[:, None]
        gates, gate_logits = [], []
        for layer in self.layers if num_windows else ():
            hidden, layer_gates, layer_logits = layer(hidden, mask, averaging, gated, least_odds)
            gates.append(layer_gates)
            gate_logits.append(layer_logits)
        if not num_windows:
            num_modules = MODULES_PER_LAYER * config.num_hidden_layers
            gates, gate_logits = [hidden.new_zeros(0, num_modules)], [hidden.new_zeros(0, num_modules, 2)]
            pooled = hidden.new_zeros(0, config.hidden_size)
        else:
            # Keywords differ in length: each feature counts where it is strongest.
            pooled = hidden.masked_fill(~mask[..., None], torch.finfo(hidden.dtype).min).amax(1)
        run, leave_out = torch.cat(gate_logits, 1).unbind(-1)
        no_padding = len(hidden) == window_mask.numel()

        def of_windows(values: torch.Tensor, padding: float = 0.0) -> torch.Tensor:
            shape = (*window_mask.shape, values.shape[-1])
            if no_padding:
                return values.view(shape)
            return values.new_full(shape, padding).masked_scatter(window_mask[..., None], values)

        detected = self.detection_head(pooled)
        detection_logits = of_windows(detected, torch.finfo(detected.dtype).min)[..., 0]
        class_logits = of_windows(self.classifier(pooled))
        logits = None
        if num_windows:
            best = detection_logits.argmax(-1)
            logits = class_logits[torch.arange(len(best), device=best.device), best]
        return GatedConformerOutput(
            logits=logits,
            detection_logits=detection_logits,
            class_logits=class_logits,
            locations=of_windows(self.location_head(pooled)),
            gates=of_windows(torch.cat(gates, -1)),
            gate_probabilities=of_windows((run - leave_out).sigmoid()),
            window_starts=FRAMES_PER_STEP * starts,
            window_mask=window_mask,
        )

    def _check_features(self, input_features: torch.Tensor, num_streams: int | None = None) -> None:
        mels = self.config.num_mel_bins
        if input_features.dim() != 3 or input_features.shape[-1] != mels:
            raise ValueError(
                f"`input_features` must have the shape (batch_size, num_frames, {mels}), got {tuple(input_features.shape)}: "
                "`feature_size` of the feature extractor is `num_mel_bins` of the model."
            )
        if num_streams is not None and len(input_features) != num_streams:
            raise ValueError(
                f"`input_features` has {len(input_features)} rows and `state` is of {num_streams} streams: each row goes on with "
                "its own stream; begin others with `start_stream(batch_size)`."
            )
