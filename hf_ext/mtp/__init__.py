"""Multi-token prediction with mask tokens and gated LoRA (https://huggingface.co/papers/2507.11851)."""
