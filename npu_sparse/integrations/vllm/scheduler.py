"""The scheduler of `--scheduler-cls`: it ends the chunks of a prompt at multiples of the budget's `block`.

Queries share a support in blocks that are counted from a chunk's first token, and vLLM ends a chunk where a step is full, other
requests' tokens counted. Cut here, a prompt has the supports that it would have in one piece, whatever else is served.
"""

from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from ...budget import Budget
from ...ops.select_two_level.blocks import group_size
from .chunks import aligned, check_room
from .options import budget_of


class AlignedScheduler(AsyncScheduler):
    """vLLM's scheduler, with the ends of chunks moved back to the last multiple. A step may hold fewer tokens for it."""

    def __init__(self, vllm_config, *args, **kwargs):
        budget = budget_of(vllm_config.load_config)
        self._multiple = together(budget)
        scheduling = vllm_config.scheduler_config
        check_room(
            self._multiple, scheduling.max_num_batched_tokens, scheduling.max_num_seqs, scheduling.long_prefill_token_threshold
        )
        super().__init__(vllm_config, *args, **kwargs)
        # Linear attention whose states are cached has ends of its own, which cannot be moved.
        self._theirs = self.need_mamba_block_aligned_split
        self.need_mamba_block_aligned_split = True

    def _mamba_block_aligned_split(
        self, request, num_new_tokens, num_new_local_computed_tokens=0, num_external_computed_tokens=0
    ):
        if self._theirs:
            return super()._mamba_block_aligned_split(
                request, num_new_tokens, num_new_local_computed_tokens, num_external_computed_tokens
            )
        start = request.num_computed_tokens + num_new_local_computed_tokens + num_external_computed_tokens
        return aligned(start, num_new_tokens, request.num_prompt_tokens, self._multiple)


def together(budget: Budget) -> int:
    """How many queries select together."""
    return group_size(budget.block) if budget.candidates else budget.block
