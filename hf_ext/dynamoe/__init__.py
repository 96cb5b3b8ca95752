"""
Nested experts: a dense model whose MLPs become slices of themselves, one chosen for each token by its difficulty.

The modeling files travel with each checkpoint and know nothing of this package. What it adds to the class stands here.
"""

from types import ModuleType

import wrapt


def _write_cards(modeling: ModuleType) -> None:
    from hf_ext.hub.model_card import write_dynamoe_unless_written

    modeling.DynaMoeForCausalLM.card_writer = staticmethod(write_dynamoe_unless_written)


wrapt.register_post_import_hook(_write_cards, "hf_ext.dynamoe.modeling_dynamoe")
