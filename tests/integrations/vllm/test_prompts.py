"""`exact_last` is at the prompt's end, whichever chunk holds it, where the model runner says how long a prompt is."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from npu_sparse import ops
from npu_sparse.integrations.vllm.prompts import WORKER, Prompts, provide_state, state_of

SPARSE = "k=32,block=16,exact_last=24"


class ModelState:
    """As vLLM's, as far as it is asked here."""

    def __init__(self, vllm_config, model, encoder_cache, device):
        self.added = []

    def add_request(self, req_index, new_req_data):
        self.added.append(req_index)

    def prepare_attn(self, input_batch, cudagraph_mode, *, for_capture=False):
        return cudagraph_mode, for_capture


def request(tokens: int):
    return SimpleNamespace(prompt_token_ids=list(range(tokens)))


def test_a_model_state_tells_the_prompts_of_the_batch_by_row():
    prompts = Prompts()
    assert prompts.of_batch() is None
    state = state_of(ModelState, prompts)(None, None, None, None)
    for number, tokens in ((4, 90), (0, 7), (2, 33)):
        state.add_request(number, request(tokens))
    assert state.added == [4, 0, 2], "the base is told, too"
    batch = SimpleNamespace(idx_mapping_np=np.array([2, 4], dtype=np.int32))
    assert state.prepare_attn(batch, "mode", for_capture=True) == ("mode", True)
    assert prompts.of_batch() == [33, 90]
    state.add_request(2, request(5))  # the number goes to the next request
    state.prepare_attn(SimpleNamespace(idx_mapping_np=np.array([0, 2, 7], dtype=np.int32)), "mode")
    assert prompts.of_batch() == [7, 5, 0], "a dummy batch may have numbers of nobody"


def test_a_model_that_has_a_state_of_its_own_keeps_it():
    model = SimpleNamespace(get_model_state_cls=lambda: ModelState)
    provide_state(model, None, Prompts())
    state = model.get_model_state_cls()
    assert issubclass(state, ModelState) and state is not ModelState


@pytest.fixture
def exact_positions(monkeypatch):
    """The positions that attend densely as exact rows, of all layers and chunks."""
    seen, dense_rows = set(), ops.dense_rows

    def watched(q, k, v, positions, **options):
        seen.update(positions.flatten().tolist())
        return dense_rows(q, k, v, positions, **options)

    monkeypatch.setattr(ops, "dense_rows", watched)
    return seen


@pytest.mark.vllm
@pytest.mark.parametrize("tokens, steps", [(133, [(0, 128), (128, 5)]), (200, [(0, 128), (128, 72)]), (20, [(0, 20)])])
def test_exact_rows_are_the_prompts_last(tokens, steps, engine, prompts, exact_positions):
    (served,) = engine("llama", SPARSE, worker_cls=WORKER).serve(prompts(tokens), max_tokens=1)
    assert served.steps == steps
    assert exact_positions == {*range(max(0, tokens - 24), tokens)}


@pytest.mark.vllm
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_chunks_prefix_hits_and_second_turns_give_what_transformers_gives(name, engine, checkpoints, reference, prompts):
    served_by = engine(name, SPARSE, worker_cls=WORKER)
    served = served_by.serve(prompts(37, 150, 300, 90))
    assert served_by.mixed_batches() > 0 and max(one.chunks for one in served) >= 3
    check = reference(checkpoints(name), SPARSE, said=True).check
    for one in served:
        check(one)
    with pytest.raises(AssertionError):
        reference(checkpoints(name), SPARSE).check(served[2])  # whose chunks would all end exactly
    last = served[2]
    again = served_by.serve([last.prompt + last.tokens + prompts(70, seed=5)[0]])[0]
    assert again.steps[0][0] >= 256, "the prefix cache was hit"
    check(again, before=last)


@pytest.mark.vllm
@pytest.mark.parametrize("budget", [SPARSE, "k=32,block=16"])
def test_what_a_preempted_request_had_written_is_read_again_as_it_was_written(budget, engine, checkpoints, reference, prompts):
    """Its prompt runs sparse and ends where it did; the rest runs dense."""
    options = dict(block_size=32, num_gpu_blocks_override=17, max_model_len=192, max_num_batched_tokens=512, worker_cls=WORKER)
    served = engine("llama", budget, **options).serve(prompts(150, 151, 152), max_tokens=24)
    again = [one for one in served if one.restarts and any(start < len(one.prompt) < start + count for start, count in one.steps)]
    assert again, "some step holds the prompt's end and tokens after it"
    check = reference(checkpoints("llama"), budget, said=True).check
    for one in served:
        check(one)
    with pytest.raises(AssertionError):
        for one in again:
            reference(checkpoints("llama"), budget).check(one)


@pytest.mark.vllm
def test_model_runner_v2_finds_the_class_of_its_state_on_the_model(vllm):
    try:
        from vllm.v1.worker.gpu.model_states import init_model_state
        from vllm.v1.worker.gpu.model_states.default import DefaultModelState
    except ImportError as error:
        pytest.skip(f"Model Runner V2 cannot be imported here: {error}")
    config = SimpleNamespace(model_config=SimpleNamespace(is_hybrid=False, enable_prompt_embeds=False))
    model = torch.nn.Linear(1, 1)
    provide_state(model, config, Prompts())
    state = model.get_model_state_cls()
    assert issubclass(state, DefaultModelState)
    made = []
    model.get_model_state_cls = lambda: lambda *given: made.append(given)
    init_model_state(config, model, None, torch.device("cpu"))
    assert made == [(config, model, None, torch.device("cpu"))], "vLLM asks the model first"
