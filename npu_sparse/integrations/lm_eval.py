"""lm-eval's model `npu-sparse`: transformers with a sparse prefill. Importing this file registers it, and needs lm-eval.

`npu-sparse lm-eval` (harness.py) imports it before lm-eval reads its arguments, for lm-eval 0.4.13 looks for no plugins.
"""

import logging

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from ..budget import Budget
from ..indexer import Indexer
from ..measure.variants import VARIANTS, adapter_fingerprint, selector_of
from ..ops import workspace
from ..prefill import SparsePrefill

_log = logging.getLogger(__name__)

SELECTORS = tuple(name for name, variant in VARIANTS.items() if name == variant.chooser)
REFUSED = {
    "parallelize": "an indexer lives on one device",
    "tp_plan": "an indexer lives on one device",
    "autogptq": "the model has to be one that transformers loads",
    "gptqmodel": "the model has to be one that transformers loads",
    "delta": "an adapter knows the weights of its checkpoint only",
}


@register_model("npu-sparse")
class NpuSparseLM(HFLM):
    """A transformers model whose prompts are read sparsely and whose answers are decoded densely.

    Generation reads each prompt in one sparse forward. A log-likelihood is that of a served answer: the context is the prompt and
    runs sparse; the continuation after it runs dense, as decode steps do. A rolling log-likelihood (perplexity) has no prompt
    before its text: every window runs sparse. Sequences are read one at a time whatever `batch_size` says: padding in a batch
    would shift the blocks of queries that share their keys, and answers would depend on what else is asked.

    Args:
        pretrained: a demo name, a directory, a GGUF file or a hub id (`checkpoints.load`).
        adapter: the indexer's directory, or the name of a shipped one; wanted by selector "indexer".
        budget: as `Budget.parse` spells it; "" = what the adapter recommends, else Budget().
        selector: "indexer", "dense" (the same instrument without a budget), "oracle", or a control of `SELECTORS`.
        impl, workspace_mib: as in `SparsePrefill.attach`.
        options: what lm-eval's "hf" model takes (dtype, device, batch_size, max_length, peft, ...); not several devices for one
            model.

    Raises ValueError, AdapterError, CheckpointError, UnsupportedArchitectureError or KernelUnavailableError.
    """

    def __init__(
        self, pretrained: str, adapter: str | None = None, budget: str = "", selector: str = "indexer", impl: str = "auto",
        workspace_mib: int = workspace.DEFAULT_MIB, **options,
    ):  # fmt: skip
        budget = _budget(budget, options)
        _check(selector, adapter, budget, options)
        indexer = None if adapter is None else Indexer.from_pretrained(adapter)
        from ..checkpoints import prepare

        checkpoint = prepare(str(pretrained))
        super().__init__(pretrained=str(checkpoint.path or checkpoint.name), **options)
        if self.backend != "causal":
            raise ValueError(f"pretrained must be a causal language model, got a {self.backend} one")
        self.attached = None
        if selector != "dense":
            if self.batch_size != 1:
                _log.warning("npu-sparse reads one sequence at a time: batch_size is 1, not %s", self.batch_size)
            self.batch_size_per_gpu = 1
            self.attached = SparsePrefill.attach(
                self.model, selector_of(selector, indexer), budget, impl=impl, workspace_mib=workspace_mib
            )
        self._facts = {"npu_sparse_selector": selector, "npu_sparse_budget": "", "npu_sparse_evidence": "dense"}
        if self.attached is not None:
            self._facts["npu_sparse_budget"] = str(self.attached.budget)
            self._facts["npu_sparse_evidence"] = self.attached.selector.evidence
        if indexer is not None:
            self._facts["npu_sparse_adapter"] = adapter_fingerprint(indexer)

    def get_model_info(self) -> dict:
        """What lm-eval writes beside its results: the Budget that ran, the selector, its evidence, the adapter's fingerprint."""
        return {**super().get_model_info(), **self._facts}

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, override_bs: int | None = None):
        """`(log-likelihood, whether greedy decoding writes it)` of every `(request, context ids, continuation ids)`.

        A request that is None is a rolling window. Requests that share all but their last token share a forward.
        """
        order = sorted(range(len(requests)), key=lambda n: (-len(requests[n][1] + requests[n][2]), requests[n][1:]))
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        read = logits = None
        for n in tqdm(order, disable=disable_tqdm or self.rank != 0, desc="Running loglikelihood requests"):
            request, context, continuation = requests[n]
            if len(continuation) > self.max_length:
                raise ValueError(f"continuation must fit {self.max_length} tokens, got {len(continuation)}")
            tokens = (context + continuation)[-(self.max_length + 1) :]
            prompt = None if request is None else len(tokens) - len(continuation)
            if (asked := (tokens[:-1], len(continuation), prompt)) != read:
                logits, read = self._logits(*asked), asked
            answers[n] = _judged(logits, continuation, self.softmax_dtype)
            if request is not None:
                self.cache_hook.add_partial("loglikelihood", request, answers[n])
        return answers

    def _logits(self, tokens: list[int], last: int, prompt: int | None) -> torch.Tensor:
        """The logits `[last, vocabulary]` after the last tokens; `prompt` tokens run sparse, None = all."""
        ids = torch.tensor([tokens], device=self.device)
        said = {"prompt_length": prompt} if prompt is not None and self.attached is not None else {}
        dtype = self.mixed_precision_dtype
        with torch.no_grad(), torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            return self.model(ids, use_cache=False, logits_to_keep=last, **said).logits[0]


def _judged(logits: torch.Tensor, continuation: list[int], dtype: torch.dtype | None) -> tuple[float, bool]:
    ids = torch.tensor(continuation, device=logits.device)
    scores = torch.log_softmax(logits, dim=-1, dtype=dtype)
    return float(scores.gather(-1, ids[:, None]).sum()), bool((scores.argmax(dim=-1) == ids).all())


def _budget(text, options: dict) -> Budget | None:
    """The Budget that a model argument spells, None where it spells none.

    lm-eval cuts its arguments at commas: the fields of a budget without quotes arrive as arguments of their own.
    """
    loose = [f"{name}={options[name]}" for name in Budget.__dataclass_fields__ if name in options]
    if loose:
        whole = ",".join([str(text), *loose]).strip(",")
        raise ValueError(f'budget must stand in quotes, budget="{whole}", got {", ".join(loose)} beside it')
    return Budget.parse(text) if text else None


def _check(selector: str, adapter, budget: Budget | None, options: dict) -> None:
    if selector not in SELECTORS:
        raise ValueError(f"selector must be one of {', '.join(SELECTORS)}, got {selector!r}")
    if selector == "indexer" and adapter is None:
        raise ValueError("adapter must name an indexer's directory for selector 'indexer', got none")
    if selector == "dense" and budget is not None:
        raise ValueError(f"budget must be empty for selector 'dense', got {str(budget)!r}")
    for name, reason in REFUSED.items():
        if options.get(name):
            raise ValueError(f"{name} must not be set for npu-sparse ({reason}), got {options[name]!r}")
