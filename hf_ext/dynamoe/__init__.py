"""DynaMoE: a dense language model becomes a mixture of nested experts (https://huggingface.co/papers/2502.12325)."""
