"""Teacher-forced answers: how a prefill changes the likelihood of the known answer, without generating.

A variant prefills the prompt. The tokens of its answer then go through one dense continuation on the cache that the prefill left,
as in decoding, so only the prompt is sparse. The first answer token is read from the prompt's last row, every other from the row
of the token before it. A prompt counts as right where every answer token is the most likely one. Tokens between several answers
do not count, because models write lists differently. KL(dense || variant) in nats is the mean over the answer's positions.

Generated scores flatter sparse prefill where decoding is dense: the first generated token is often only a space, and the queries
after it read every key. Teacher forcing judges all positions in one forward, and the KL moves long before an answer is lost.

Under stress, prompt and answer go through one forward of the variant, so that the answer's rows are sparse too. No deployment
does that, so these figures have columns of their own.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from inspect import signature
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from ..tasks import Example, encode, reference_answer

LOGIT_ELEMENTS = 1 << 26  # fp32 logits of one model alive at once
FLATTERS = (
    "Generated scores flatter sparse prefill: decoding is dense, the first token generated is often only a space, and the tokens "
    "after it are found by queries that read every key."
)


@dataclass(frozen=True)
class Forced:
    """A prompt and the answer that follows it, as token ids, at least one each.

    `counts` says which tokens of the answer have to be the most likely ones: not those between several answers, whose form models
    choose differently. None = all.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    counts: tuple[bool, ...] | None = None

    def __post_init__(self):
        for name in ("prompt", "answer"):
            if not getattr(self, name):
                raise ValueError(f"{name} must hold at least one token, got none")
        if self.counts is not None and (len(self.counts) != len(self.answer) or not any(self.counts)):
            raise ValueError(f"counts must say of {len(self.answer)} tokens which count, one at least, got {self.counts}")


def forced(tokenizer, example: Example) -> Forced:
    """The prompt of an example and its reference answer; the tokens that count are those that touch one of its answers.

    The answer is tokenized with the prompt before it; where their tokens would run into each other it is tokenized alone. Raises
    ValueError where the answer takes more than the example's new tokens, and for a tokenizer that does not say where they stand.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"tokenizer must be a fast one, which says where tokens stand, got {type(tokenizer).__name__}")
    prompt = encode(tokenizer, example)
    reference = reference_answer(example)
    before = len(example.prompt)
    options = dict(return_offsets_mapping=True, verbose=False)
    both = tokenizer(example.prompt + reference.text, add_special_tokens=not example.chat, **options)
    answer, places = both["input_ids"][len(prompt) :], both["offset_mapping"][len(prompt) :]
    if both["input_ids"][: len(prompt)] != prompt:
        alone = tokenizer(reference.text, add_special_tokens=False, **options)
        answer, places, before = alone["input_ids"], alone["offset_mapping"], 0
    if len(answer) > example.max_new_tokens:
        raise ValueError(
            f"max_new_tokens must hold the answer of {example.task} example {example.index} ({len(answer)} tokens), "
            f"got {example.max_new_tokens}"
        )
    spans = [(start + before, end + before) for start, end in reference.spans]
    counts = tuple(any(max(first, start) < min(last, end) for start, end in spans) for first, last in places)
    return Forced(tuple(prompt), tuple(answer), counts)


@torch.no_grad()
def answer_states(
    model, asked: Forced, attach: Callable[[], AbstractContextManager] = nullcontext, chunk: int | None = None
) -> Tensor:
    """What the output embedding reads at every answer position, `[A, hidden]`: the prompt as attached, the answer dense.

    Args:
        attach: makes the context in which the prompt is prefilled, for example `SparsePrefill.attach(...)`.
        chunk: the prompt is prefilled in chunks of so many tokens; None = in one forward.

    Raises ValueError where the model changes its logits after the output embedding.
    """
    from ..models.architectures import delta_net_modules

    prompt, answer = (torch.tensor([ids], device=model.device) for ids in (asked.prompt, asked.answer))
    with _last_hidden(model) as last:
        cache, length = {}, {} if chunk is None else {"prompt_length": prompt.shape[1]}
        with attach() as attached:
            told = {} if attached is None else length  # a model that is not attached does not ask
            for part in prompt.split(chunk or prompt.shape[1], 1):
                out = model(input_ids=part, use_cache=True, logits_to_keep=1, **cache, **told)
                cache = _cache(model, out)
        rows = [last[0][0, -1:]]
        _require_plain(model, out.logits[0, -1], rows[0][0])
        # as decoding does: early versions of transformers cannot continue linear attention by several tokens
        together = 1 if delta_net_modules(model) else max(1, answer.shape[1] - 1)
        for part in answer[:, :-1].split(together, 1) if answer.shape[1] > 1 else ():
            model(input_ids=part, use_cache=True, logits_to_keep=1, **cache)
            rows.append(last[0][0])
    return torch.cat(rows).clone()


@torch.no_grad()
def stressed_states(model, asked: Forced, attach: Callable[[], AbstractContextManager] = nullcontext) -> Tensor:
    """As `answer_states`, but prompt and answer in one forward, all of it as attached."""
    ids = torch.tensor([[*asked.prompt, *asked.answer[:-1]]], device=model.device)
    with _last_hidden(model) as last, attach():
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    return last[0][0, len(asked.prompt) - 1 :].clone()


@torch.no_grad()
def judge(model, asked: Forced, states: Tensor, dense: Tensor) -> dict:
    """How well a variant's rows predict the answer, against dense rows, both `[A, hidden]`; logits and all after them are fp32.

    `right`: 1.0 where every token that counts is the most likely one, else 0.0; `tokens`: the share of them that is; `kl`:
    KL(dense || variant) in nats, the mean over all of the answer's positions.
    """
    head = model.get_output_embeddings()
    weight, bias = head.weight.float(), None if head.bias is None else head.bias.float()
    answer = torch.tensor(asked.answer, device=states.device)
    if states.shape != dense.shape or len(states) != len(answer):
        raise ValueError(f"states must have {len(answer)} rows, one a token, got {len(states)} and {len(dense)} dense ones")
    rows = max(1, LOGIT_ELEMENTS // len(weight))
    hits, kl = [], []
    for start in range(0, len(states), rows):
        part = slice(start, start + rows)
        q = functional.linear(states[part].float(), weight, bias)  # [rows, vocabulary]
        p = functional.linear(dense[part].to(states.device).float(), weight, bias).log_softmax(-1)
        hits.append(q.argmax(-1) == answer[part])
        kl.append((p.exp() * (p - q.log_softmax(-1))).sum(-1))
    equal = torch.cat(hits).double()
    if asked.counts is not None:
        equal = equal[torch.tensor(asked.counts, device=equal.device)]
    divergence = torch.cat(kl).clamp_(min=0.0)  # rounding can leave -1e-7 where the two are equal
    return {"right": float(equal.min()), "tokens": float(equal.mean()), "kl": float(divergence.double().mean())}


def score_forced(
    model,
    questions: Sequence[Forced],
    attach: Callable[[], AbstractContextManager] | None = None,
    dense: Sequence[Tensor] | None = None,
    *,
    stress: bool = False,
    chunk: int | None = None,
) -> tuple[list[dict], list[Tensor]]:
    """`judge` of every question, and the rows that were judged; with `stress`, `stress_right` and `stress_kl` beside them.

    Args:
        attach: as in `answer_states`; None = the model as it is.
        dense: the rows of the dense model for the same questions; None = this is the dense model.
    """
    samples, states = [], []
    for n, asked in enumerate(questions):
        own = answer_states(model, asked, attach or nullcontext, chunk)
        truth = own if dense is None else dense[n].to(own.device)
        sample = judge(model, asked, own, truth)
        if stress:
            stressed = judge(model, asked, stressed_states(model, asked, attach or nullcontext), truth)
            sample |= {f"stress_{name}": stressed[name] for name in ("right", "kl")}
        samples.append(sample)
        states.append(own.cpu())
    return samples, states


def write_questions(path: Path, questions: Sequence[Forced], identity: Mapping[str, object]) -> None:
    """Prompts and answers as safetensors of token ids, with what they were made of."""
    from safetensors.torch import save

    from ..runs.store import write_bytes

    ids = {}
    for n, asked in enumerate(questions):
        counts = asked.counts or (True,) * len(asked.answer)
        ids |= {f"{n}.{name}": torch.tensor(value, dtype=torch.int32) for name, value in (
            ("prompt", asked.prompt), ("answer", asked.answer), ("counts", counts)
        )}  # fmt: skip
    write_bytes(path, save(ids, metadata={"identity": json.dumps(identity)}))


def read_questions(path: Path, identity: Mapping[str, object]) -> list[Forced]:
    """What `write_questions` wrote. ValueError where it was made of something else or is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            made = json.loads((file.metadata() or {}).get("identity", "null"))
            if made != json.loads(json.dumps(identity)):
                raise ValueError(f"{path} must hold prompts of {dict(identity)}, got {made}: delete it to make them again")
            kept = {name: file.get_tensor(name).tolist() for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read ({error}): delete it to make it again") from error
    numbers = range(len(kept) // 3)
    return [
        Forced(tuple(kept[f"{n}.prompt"]), tuple(kept[f"{n}.answer"]), tuple(map(bool, kept[f"{n}.counts"]))) for n in numbers
    ]


def write_states(path: Path, states: Sequence[Tensor]) -> None:
    """Rows of one task, `[A, hidden]` a question, as safetensors: 0.1 MB where logits would take 30."""
    from safetensors.torch import save

    from ..runs.store import write_bytes

    write_bytes(path, save({str(n): rows.contiguous() for n, rows in enumerate(states)}))


def read_states(path: Path) -> list[Tensor]:
    """What `write_states` wrote."""
    from safetensors.torch import load

    stored = load(Path(path).read_bytes())
    return [stored[str(n)] for n in range(len(stored))]


@contextmanager
def _last_hidden(model):
    """A list whose only element is what the decoder last returned, `[B, T, hidden]`."""
    last: list[Tensor] = []

    def keep(module, args, output) -> None:
        last[:] = [output.last_hidden_state]

    handle = model.base_model.register_forward_hook(keep)
    try:
        yield last
    finally:
        handle.remove()


def _cache(model, out) -> dict:
    """The cache of a forward as the next one takes it: its name changed in transformers 5.24."""
    name = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"
    return {name: getattr(out, name)}


def _require_plain(model, logits: Tensor, hidden: Tensor) -> None:
    expected = model.get_output_embeddings()(hidden).float()
    if not torch.allclose(logits.float(), expected, rtol=0.05, atol=0.05 * float(expected.abs().max())):
        raise ValueError(f"{type(model).__name__} changes its logits after the output embedding: not supported")
