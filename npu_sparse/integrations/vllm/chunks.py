"""Where chunks of a prompt end that are to have the supports of the whole prompt."""


def aligned(start: int, count: int, prompt: int, multiple: int) -> int:
    """How many of `count` tokens from `start` on are read in this step; 0 = none, and the next step has more room.

    A chunk that does not reach the prompt's end ends at a multiple; one that begins elsewhere, behind a prefix that was cached,
    at the next one. What follows a prompt is not cut.
    """
    if start >= prompt:
        return count
    if off := start % multiple:
        return min(count, multiple - off)
    return count if start + count >= prompt else count // multiple * multiple


def check_room(multiple: int, batched: int, requests: int, threshold: int) -> None:
    """Raises ValueError where a prompt might wait for ever for a step that has room for `multiple` of its tokens."""
    if batched < multiple + requests:
        raise ValueError(
            f"max-num-batched-tokens must be >= {multiple + requests} for AlignedScheduler, {multiple} of a prompt and one of "
            f"each of max-num-seqs, got {batched}"
        )
    if 0 < threshold < multiple:
        raise ValueError(f"long-prefill-token-threshold must be 0 or >= {multiple} for AlignedScheduler, got {threshold}")
