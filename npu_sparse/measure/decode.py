"""The one decoder of measurements: greedy, in left-padded batches."""

from inspect import signature

from ..tasks import never_falls, score


def generate_texts(model, tokenizer, examples, ids, batch: int) -> list[str]:
    """The greedy output of every example, in their order, from batches of prompts of similar length, padded on the
    left.

    A row stops at its end-of-sequence token, at `max_new_tokens`, or as soon as its score is 1: scores look for answers
    anywhere in the output and more output never lowers them, so that stopping there changes no score.
    """
    import torch
    from transformers import GenerationConfig, StoppingCriteriaList

    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else list(ends) if isinstance(ends, (list, tuple)) else [ends]
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, *ends) if i is not None), 0)
    outputs: dict[int, str] = {}
    order = sorted(range(len(ids)), key=lambda n: (len(ids[n]), n))
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        width = max(len(ids[n]) for n in rows)
        tokens = torch.tensor([[pad] * (width - len(ids[n])) + list(ids[n]) for n in rows])  # [B, width]
        mask = torch.tensor([[0] * (width - len(ids[n])) + [1] * len(ids[n]) for n in rows])
        reading = _reading(tokenizer, [examples[n] for n in rows], width, ends)
        greedy = GenerationConfig(
            max_new_tokens=max(examples[n].max_new_tokens for n in rows), do_sample=False, num_beams=1, use_cache=True,
            repetition_penalty=1.0, eos_token_id=ends or None, pad_token_id=pad, disable_compile=True,
        )  # fmt: skip
        with torch.inference_mode():
            model.generate(
                input_ids=tokens.to(model.device), attention_mask=mask.to(model.device), generation_config=greedy,
                stopping_criteria=StoppingCriteriaList([reading]),
            )  # fmt: skip
        outputs.update(zip(rows, reading.texts))
    return [outputs[n] for n in range(len(ids))]


def cache_argument(model) -> str:
    """The name under which a model's forward takes its cache: it changed in transformers 5.24."""
    return "cache" if "cache" in signature(model.forward).parameters else "past_key_values"


def _reading(tokenizer, examples, prompt_tokens: int, ends: list[int]):
    """A stopping criterion that reads each row's output as it grows, in `texts`, and stops the rows whose score is
    1."""
    import torch
    from transformers import StoppingCriteria

    class Reading(StoppingCriteria):
        def __init__(self):
            self.texts = [""] * len(examples)
            self.done = [False] * len(examples)

        def __call__(self, input_ids, scores, **kwargs):
            for row, tokens in enumerate(input_ids[:, prompt_tokens:].tolist()):
                if self.done[row]:
                    continue
                if ended := tokens[-1] in ends:
                    tokens = tokens[:-1]
                self.texts[row] = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                correct = never_falls(examples[row]) and score(examples[row], self.texts[row]) == 1
                full = correct or len(tokens) >= examples[row].max_new_tokens
                self.done[row] = ended or full
            return torch.tensor(self.done, device=input_ids.device)

    return Reading()
