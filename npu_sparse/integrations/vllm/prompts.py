"""How long the prompts of a batch are: vLLM's metadata of a batch does not say it, its model runners know it.

Model Runner V2 asks a model for the class of its ModelState: `state_of` is a subclass of the one that it would take. The older
runner asks for nothing of the kind, but a worker may be one's own: `worker.py`, which `--worker-cls` names. Where nobody says
it, every chunk takes its own end for the prompt's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

WORKER = "npu_sparse.integrations.vllm.worker.Worker"


@dataclass(eq=False)
class Prompts:
    """Tokens of the prompts of the batch that is being planned, by row.

    Attributes:
        source: gives them; None where no runner says it.
    """

    source: Callable[[], Sequence[int]] | None = None

    def of_batch(self) -> Sequence[int] | None:
        return None if self.source is None else self.source()


def state_of(base: type, prompts: Prompts) -> type:
    """A subclass of a ModelState that tells `prompts` about every batch before its metadata is built."""

    class State(base):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self._prompt_of: dict[int, int] = {}  # by the runner's number of a request
            self._batch: list[int] = []
            prompts.source = lambda: self._batch

        def add_request(self, req_index, new_req_data):
            super().add_request(req_index, new_req_data)
            self._prompt_of[req_index] = len(new_req_data.prompt_token_ids)

        def prepare_attn(self, input_batch, *args, **kwargs):
            # a dummy batch may have numbers that nobody has; nothing of it runs sparse
            self._batch = [self._prompt_of.get(number, 0) for number in input_batch.idx_mapping_np.tolist()]
            return super().prepare_attn(input_batch, *args, **kwargs)

    State.__name__ = State.__qualname__ = f"NpuSparse{base.__name__}"
    return State


def provide_state(model, vllm_config, prompts: Prompts) -> None:
    """Gives a model, where Model Runner V2 looks for it, the class of its ModelState."""
    theirs = getattr(model, "get_model_state_cls", None)

    def get_model_state_cls() -> type:
        if theirs is not None:
            return state_of(theirs(), prompts)
        if vllm_config.model_config.is_hybrid:
            from vllm.v1.worker.gpu.model_states.mamba_hybrid import MambaHybridModelState as base
        else:
            from vllm.v1.worker.gpu.model_states.default import DefaultModelState as base
        return state_of(base, prompts)

    model.get_model_state_cls = get_model_state_cls
