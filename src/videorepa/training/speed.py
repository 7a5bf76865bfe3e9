"""Makes the transformer's blocks compute faster: compiled, or by another kernel for attention."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from videorepa.backbones import Backbone
from videorepa.errors import UserError, as_user_error


def choose_attention(
    backbone: Backbone, backend: str, device: torch.device, dtype: torch.dtype
) -> None:
    """Let the transformer compute attention with one of diffusers' backends.

    A few tokens are attended to first, so that a backend that does not work here is refused before
    the training, as are those that give no gradients or do not heed a mask. On the meta device
    nothing is chosen.

    Args:
      backbone: Its transformer has been loaded.
      backend: The backend's name in diffusers.
      device: Where the transformer runs.
      dtype: What it computes in.

    Raises:
      UserError: There is no such backend, it does not work here, or the transformer's attention
        cannot be exchanged.
    """
    from diffusers.models.attention_dispatch import (
        AttentionBackendName,
        attention_backend,
        dispatch_attention_fn,
    )

    transformer, names = backbone.transformer, [each.value for each in AttentionBackendName]
    if backend not in names:
        raise UserError(
            f"speed.attention is {backend}; diffusers has the backends {', '.join(names)}."
        )
    processors = [getattr(module, "processor", None) for module in transformer.modules()]
    if not any(hasattr(processor, "_attention_backend") for processor in processors):
        raise UserError(
            f"speed.attention is {backend}, but diffusers' {type(transformer).__name__} always "
            "leaves the choice to torch. Leave speed.attention out."
        )
    if device.type == "meta":
        return
    refused = as_user_error(
        lambda error: (
            f"speed.attention is {backend}, which cannot be used here: "
            f"{str(error).strip().splitlines()[0].rstrip('.')}. Choose another, or leave "
            "speed.attention out for torch's own choice."
        )
    )
    # The context ends what set_attention_backend makes the choice of all models in the process.
    with refused, attention_backend(AttentionBackendName(backend)):
        width = transformer.config.attention_head_dim
        tokens = torch.randn(3, 1, 128, 2, width, device=device, dtype=dtype, requires_grad=True)
        mask = None
        if backbone.spec.text_mask:
            mask = torch.arange(128, device=device).view(1, 1, 1, 128) < 100
        query, key, value = tokens
        chosen = AttentionBackendName(backend)
        attended = dispatch_attention_fn(query, key, value, mask, backend=chosen)
        query, key, value = tokens.transpose(2, 3)
        expected = F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2)
        if (attended - expected).abs().max() > 0.05:
            raise ValueError("it computes something else than torch does")
        if not attended.requires_grad:
            raise ValueError("it has no backward pass")
        attended.sum().backward()
        transformer.set_attention_backend(backend)


def compile_blocks(backbone: Backbone, backend: str = "inductor") -> None:
    """Compile the forward pass of each of the transformer's blocks, for every shape anew.

    Blocks that are alike share what is compiled. Call it after adapters have been added.

    Args:
      backbone: Its transformer has been loaded.
      backend: What torch.compile hands the graphs to.

    Raises:
      UserError: Weights are exchanged while the blocks run, which a compiled block does not see.
    """
    if any(hasattr(module, "_diffusers_hook") for module in backbone.transformer.modules()):
        raise UserError(
            "speed.compile does not go with weights that are moved or cast layer by layer: with "
            "memory.offload, with memory.frozen float8, and with bfloat16 where the training "
            "computes in float32. Leave one of them out."
        )
    for block in backbone.blocks():
        # block.compile() would compile the hooks too. Here they stay outside, so that the tap and
        # FSDP2 break no graph.
        block.forward = torch.compile(block.forward, backend=backend, dynamic=False)
