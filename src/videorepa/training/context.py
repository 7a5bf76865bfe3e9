"""Shares the tokens of each clip among processes, as Ulysses does (arXiv 2309.14509).

diffusers splits the transformer's tokens and exchanges them for heads around attention. What is
added here is what a training needs besides: whole tokens for the alignment, and right gradients.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from videorepa.align.gathering import Gathering
from videorepa.errors import UserError, as_user_error
from videorepa.recipe import Recipe
from videorepa.training.parallel import Alone
from videorepa.training.student import Student


def check_context(recipe: Recipe) -> None:
    """Raise UserError unless the recipe's transformer can be shared as `parallel.context` says."""
    import diffusers

    count = 1 if recipe.parallel is None else recipe.parallel.context
    if count == 1:
        return
    backbone = recipe.backbone
    stock = getattr(diffusers, backbone.transformer_class)
    # With a mask of the text, diffusers gives attention the mask of all heads for a part of them.
    if stock._cp_plan is None or backbone.text_mask:
        raise UserError(
            f"parallel.context is {count}, and diffusers cannot share the tokens of "
            f"{stock.__name__} in a training. It can those of Wan. Set it to 1."
        )
    tokens = math.prod(backbone.shapes(recipe.data).grid.size)
    heads = backbone.config("transformer")["num_attention_heads"]
    if tokens % count or heads % count:
        raise UserError(
            f"parallel.context is {count}; it must divide the {tokens} tokens of a clip and the "
            f"{heads} heads of {backbone.weights}. Choose another, or change data.frames."
        )


def share_tokens(student: Student, workers: Alone) -> None:
    """Let the processes of each `parallel.context` run the student on the same clips together.

    Args:
      student: Changed in place, before the processes share its parameters.
      workers: The processes, of which as many as one another's neighbours share a clip.

    Raises:
      UserError: diffusers cannot do it here.
    """
    if workers.context == 1:
        return
    from diffusers import ContextParallelConfig
    from torch.distributed.device_mesh import init_device_mesh

    count = workers.context
    if not torch.accelerator.device_count():
        raise UserError(f"parallel.context is {count}; diffusers shares tokens among GPUs alone.")
    names = ("clips", "ring", "ulysses")
    mesh = init_device_mesh(workers.device.type, (workers.parts, 1, count), mesh_dim_names=names)
    with as_user_error(lambda error: f"parallel.context is {count}; diffusers says: {error}"):
        student.transformer.enable_parallelism(
            config=ContextParallelConfig(ulysses_degree=count, mesh=mesh)
        )
    student.terms.gathering = Gathering(mesh["ulysses"].get_group(), count)

    def scale(_: Any, __: Any, output: tuple[torch.Tensor, ...]) -> None:
        # diffusers hands each process its part of one loss's gradient. See Gathering.
        if output[0].requires_grad:
            output[0].register_hook(lambda gradient: gradient * count)

    student.transformer.register_forward_hook(scale)
