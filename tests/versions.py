"""Names that the supported versions of libraries have for the same thing."""

from transformers import TrainingArguments


# transformers 5.23 has the first, and warns of the second.
CHECKPOINTING = (
    "activation_checkpointing" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient_checkpointing"
)
