"""Configuration of [`GatedConformerForKeywordDetection`]."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .configuration_kws_encoder import check_sizes, check_weights


# Frames from one step of the encoder to the next: its entrance halves the rate twice.
FRAMES_PER_STEP = 4
# The fewest frames that make one step.
LEAST_FRAMES = 7


@strict
class GatedConformerConfig(PreTrainedConfig):
    r"""
    Configuration of [`GatedConformerForKeywordDetection`], after
    [Improving vision-inspired keyword spotting using dynamic module skipping](https://huggingface.co/papers/2309.00140).

    The paper's windows of 120 frames and 29 steps are known, its width, blocks, heads, kernel, features and loss weights are
    not. The defaults come to 1.02 M weights with 1,000 keywords; the paper says fewer than the 1.6 M of its predecessor. For
    Speech Commands half of them are enough (`hidden_size=64`, `intermediate_size=256`).

    Keywords are what transformers calls labels: `id2label` and `label2id`, or `num_labels`. Windows without any keyword are
    no label of their own, the detection head tells them.

    Args:
        num_mel_bins (`int`, *optional*, defaults to `40`):
            Channels of the features, as in the public code of the BC-ResNet that the paper starts from.
        window_frames (`int`, *optional*, defaults to `120`):
            Frames of features that the model sees at a time.
        hop_frames (`int`, *optional*, defaults to `8`):
            Frames from one window of a longer clip or a stream to the next, a multiple of 4. The paper doesn't say.
        hidden_size (`int`, *optional*, defaults to `96`):
            Width of the encoder.
        num_hidden_layers (`int`, *optional*, defaults to `4`):
            Conformer blocks, of four gated modules each.
        num_attention_heads (`int`, *optional*, defaults to `4`):
            Heads of their self-attention.
        intermediate_size (`int`, *optional*, defaults to `384`):
            Width of their feed-forward layers.
        conv_kernel_size (`int`, *optional*, defaults to `15`):
            Steps that their convolutions see, an odd number.
        hidden_dropout (`float`, *optional*, defaults to `0.1`):
            Dropout in training.
        gate_threshold (`float`, *optional*, defaults to `0.5`):
            A module runs where its gate's probability is above it. It can be given to each call: 0 runs everything.
        gate_relaxation (`str`, *optional*, defaults to `"straight_through"`):
            What training multiplies a module's output by: `"straight_through"`, a sample of 0 or 1 whose gradient is that of
            the Gumbel-softmax, so that training sees what inference does; or `"soft"`, the Gumbel-softmax itself. The paper
            says Gumbel-softmax and no more.
        gate_temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of the Gumbel-softmax.
        gate_open_probability (`float`, *optional*, defaults to `0.95`):
            Probability of every gate before training. The paper starts from a model trained with all modules on.
        gate_cost (`str`, *optional*, defaults to `"equal"`):
            What the gates' loss is a mean of: the probabilities of all gates (`"equal"`, as in the paper), or the same weighted
            by the multiply-accumulates of their modules (`"macs"`), which is the share of the gated work that is expected.
        gate_noise_factor (`float`, *optional*, defaults to `1.0`):
            How many times as much a window without a keyword counts in the gates' loss. The paper's is one mean of all
            windows, which 1 is; its streams are mostly background, and where training has as many keywords as background,
            more than 1 asks the background alone for what a heavier loss would ask of the keywords too.
        detection_loss_weight (`float`, *optional*, defaults to `1.0`), classification_loss_weight (`float`, *optional*,
        defaults to `1.0`), localization_loss_weight (`float`, *optional*, defaults to `1.0`), gate_loss_weight (`float`,
        *optional*, defaults to `0.1`):
            Weights of the four losses. The paper's are not known.

    Raises:
        ValueError: if a size is not positive, heads don't divide the width, the kernel is even, the window is shorter than a
            step, the hop is no multiple of 4, or a probability, temperature, weight or factor is out of range.

    Example:

    ```python
    >>> from hf_ext import GatedConformerConfig, GatedConformerForKeywordDetection

    >>> config = GatedConformerConfig(id2label={0: "yes", 1: "no"}, label2id={"yes": 0, "no": 1})
    >>> model = GatedConformerForKeywordDetection(config)
    >>> config.window_steps, model.config.num_labels
    (29, 2)
    ```
    """

    model_type = "gated_conformer"
    # `Trainer.evaluate` collects what is left: the scores of the keywords.
    keys_to_ignore_at_inference = [
        "detection_logits",
        "class_logits",
        "locations",
        "gates",
        "gate_probabilities",
        "window_starts",
        "window_mask",
        "detection_loss",
        "classification_loss",
        "localization_loss",
        "gate_loss",
    ]

    num_mel_bins: int = 40
    window_frames: int = 120
    hop_frames: int = 8
    hidden_size: int = 96
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    intermediate_size: int = 384
    conv_kernel_size: int = 15
    hidden_dropout: float | int = 0.1
    gate_threshold: float | int = 0.5
    gate_relaxation: Literal["straight_through", "soft"] = "straight_through"
    gate_temperature: float | int = 1.0
    gate_open_probability: float | int = 0.95
    gate_cost: Literal["equal", "macs"] = "equal"
    gate_noise_factor: float | int = 1.0
    detection_loss_weight: float | int = 1.0
    classification_loss_weight: float | int = 1.0
    localization_loss_weight: float | int = 1.0
    gate_loss_weight: float | int = 0.1

    def __post_init__(self, **kwargs: Any) -> None:
        check_sizes(self, "num_mel_bins", "hidden_size", "num_hidden_layers", "num_attention_heads")
        check_sizes(self, "intermediate_size", "conv_kernel_size")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`num_attention_heads` ({self.num_attention_heads}) does not divide `hidden_size` ({self.hidden_size})."
            )
        if self.conv_kernel_size % 2 == 0:
            raise ValueError(f"`conv_kernel_size` must be odd, got {self.conv_kernel_size}.")
        if self.window_frames < LEAST_FRAMES:
            raise ValueError(
                f"`window_frames` must be at least {LEAST_FRAMES}, what one step of the encoder sees, got {self.window_frames}."
            )
        if self.hop_frames < 1 or self.hop_frames % FRAMES_PER_STEP:
            raise ValueError(
                f"`hop_frames` must be a multiple of {FRAMES_PER_STEP}, the frames between two steps of the encoder, got "
                f"{self.hop_frames}."
            )
        if not 0 <= self.gate_threshold <= 1:
            raise ValueError(f"`gate_threshold` must be from 0 to 1, got {self.gate_threshold}.")
        if not 0 < self.gate_open_probability < 1:
            raise ValueError(
                f"`gate_open_probability` must be between 0 and 1 and neither, got {self.gate_open_probability}."
            )
        if not self.gate_temperature > 0:
            raise ValueError(f"`gate_temperature` must be positive, got {self.gate_temperature}.")
        losses = ("detection", "classification", "localization", "gate")
        check_weights(self, *(f"{name}_loss_weight" for name in losses), "gate_noise_factor")
        super().__post_init__(**kwargs)

    @staticmethod
    def num_steps(num_frames: Any) -> Any:
        """Steps that so many frames make, of one number (`int`) or of many (`torch.Tensor`): 120 make 29."""
        return ((num_frames - 1) // 2 - 1) // 2

    @property
    def window_steps(self) -> int:
        """Steps of one window."""
        return self.num_steps(self.window_frames)

    @property
    def hop_steps(self) -> int:
        """Steps from one window to the next."""
        return self.hop_frames // FRAMES_PER_STEP
