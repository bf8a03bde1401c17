#!/usr/bin/env python3
"""How long does a request wait for its first token in vLLM, dense and with sparse prefill, and are its tokens transformers' own?

    python scripts/bench_vllm_ttft.py --model path/to/checkpoint --adapter qwen2.5-coder-0.5b --budget k=2048,block=64 \\
        --lengths 8192,16384,32768 --requests 1,4 --batched 32768,8192 --dtype bfloat16 --budget-s 400 --output runs/vllm-ttft

Two engines in one process, vLLM's own and one with the plugin, serve the same prompts round by round and take turns at being
first. Prompts are random and new in every round. The time runs from handing over a round's requests to the first token of each.
A step of the engines takes as many tokens as the largest of `--batched`; for the smaller values their schedulers hold every step
to fewer. One prompt of `--check` tokens also goes through transformers. The report has the largest difference of the
log-probabilities of greedy tokens, sparse and dense, so that the first can be judged by the second.

Every measurement has its own record in --output. Finished ones are not made again, and none begins that would end after
`--budget-s` seconds: the same command resumes. Prints a table, then one JSON line; writes report.json and report.md.
"""

import argparse
import json
import os
import random
import sys
import time
from contextlib import nullcontext

from npu_sparse import cann

with cann.required():
    import torch

from npu_sparse import Budget, Indexer, SparsePrefill
from npu_sparse.runs import stats
from npu_sparse.runs.machine import machine, machine_line
from npu_sparse.runs.page import markdown_table
from npu_sparse.runs.store import Cells, open_run, write_json, write_text

ENGINES = ("dense", "sparse")
WRITTEN = 8  # greedy tokens that are compared
SAMPLES = {"mean_s": [float], "last_s": [float]}
CHECKED = {"tokens": [int], "transformers": [int], "same": int, "logprob_difference": float}


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def parse(arguments) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory of a checkpoint")
    parser.add_argument("--adapter", required=True, help="directory of its adapter, or the name of a shipped one")
    parser.add_argument("--budget", default="k=1024,block=64", help="as Budget.parse reads it")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--lengths", default=[8192, 16384, 32768], type=numbers, help="tokens of a prompt")
    parser.add_argument("--requests", default=[1], type=numbers, help="requests of a round, all at once")
    parser.add_argument("--batched", default=[32768], type=numbers, help="tokens that a step of the engines may hold")
    parser.add_argument("--check", default=2048, type=int, help="tokens of the prompt that transformers reads, too; 0 = none")
    parser.add_argument("--rounds", default=10, type=int)
    parser.add_argument("--eager", action="store_true", help="without torch.compile and graphs")
    parser.add_argument("--memory", default=0.4, type=float, help="share of the device's memory for each engine")
    parser.add_argument("--budget-s", type=float, help="seconds after which no measurement ends; None = all are made")
    parser.add_argument("--output", required=True)
    options = parser.parse_args(arguments)
    for name in ("lengths", "requests", "batched", "rounds"):
        least = min(getattr(options, name)) if isinstance(getattr(options, name), list) else getattr(options, name)
        if least < 1:
            parser.error(f"{name} must be >= 1, got {least}")
    if options.check > max(options.batched):
        parser.error(f"check must not exceed batched, so that it is one chunk, got {options.check} and {max(options.batched)}")
    if not 0 < options.memory < 0.5:
        parser.error(f"memory must be > 0 and < 0.5, a share for each of two engines, got {options.memory}")
    return options


def engines(options) -> list:
    """Both engines, in this process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import vllm

    from npu_sparse.integrations.vllm import register

    register()
    common = dict(
        dtype=options.dtype, max_model_len=max(*options.lengths, options.check) + WRITTEN, seed=0,
        max_num_batched_tokens=max(options.batched), max_num_seqs=max(options.requests), enable_prefix_caching=False,
        enforce_eager=options.eager, skip_tokenizer_init=True, disable_log_stats=True, gpu_memory_utilization=options.memory,
    )  # fmt: skip
    extra = {"adapter": options.adapter, "budget": options.budget}
    sparse = dict(load_format="npu_sparse", model_loader_extra_config=extra)
    return [vllm.LLM(options.model, **common), vllm.LLM(options.model, **common, **sparse)]


def core(llm):
    """The engine's own core, which is in this process."""
    return llm.llm_engine.engine_core.engine_core


def described(llm) -> dict:
    """Which attention and which model runner an engine has."""
    config = core(llm).vllm_config
    layer = next(one for one in config.compilation_config.static_forward_context.values() if hasattr(one, "impl"))
    version = getattr(layer.impl, "vllm_flash_attn_version", None)
    name = layer.attn_backend.get_name() + ("" if version is None else f" {version}")
    return {"attention": name, "runner": 2 if getattr(config, "use_v2_model_runner", False) else 1}


def first_tokens(llm, prompts: list[list[int]]) -> list[float]:
    """Seconds to the first token of each of some requests that come at once."""
    from vllm import SamplingParams

    engine, waited = llm.llm_engine, []
    begun = time.perf_counter()
    for number, prompt in enumerate(prompts):
        name = f"{begun}-{number}"
        engine.add_request(
            name, {"prompt_token_ids": prompt}, SamplingParams(max_tokens=1, temperature=0, detokenize=False, ignore_eos=True)
        )
    while engine.has_unfinished_requests():
        waited += [time.perf_counter() - begun for output in engine.step() if output.finished]
    return waited


def checked(options, both: list, vocabulary: int) -> dict:
    """What each engine and transformers make of one prompt."""
    from transformers import AutoModelForCausalLM, DynamicCache
    from vllm import SamplingParams

    prompt = [random.Random(1).randrange(vocabulary) for _ in range(options.check)]
    greedy = SamplingParams(max_tokens=WRITTEN, temperature=0, logprobs=0, detokenize=False, ignore_eos=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype)).to(device).eval()
    counts = {}
    for name, llm in zip(ENGINES, both):
        (output,) = llm.generate([{"prompt_token_ids": prompt}], greedy, use_tqdm=False)[0].outputs
        tokens = list(output.token_ids)
        theirs = [next(iter(one.values())).logprob for one in output.logprobs]
        attached = nullcontext()
        if name == "sparse":
            attached = SparsePrefill.attach(model, Indexer.from_pretrained(options.adapter), Budget.parse(options.budget))
        with attached, torch.no_grad():
            cache, ids, ours, best = DynamicCache(config=model.config), prompt, [], []
            for token in tokens:
                ids = torch.tensor([ids], device=device)
                logits = model(ids, past_key_values=cache, logits_to_keep=1).logits[0, -1].float().log_softmax(-1)
                ours.append(float(logits[token]))
                best.append(int(logits.argmax()))
                ids = [token]
        counts[name] = {
            "tokens": tokens, "transformers": best, "same": sum(a == b for a, b in zip(tokens, best)),
            "logprob_difference": max(abs(a - b) for a, b in zip(ours, theirs)),
        }  # fmt: skip
    return counts


def measured(options, both: list, vocabulary: int, length: int, requests: int, batched: int) -> dict:
    """The seconds of every round of one measurement."""
    for llm in both:
        core(llm).scheduler.max_num_scheduled_tokens = batched
    rng = random.Random(f"{length} {requests} {batched}")
    samples = {name: {"mean_s": [], "last_s": []} for name in ENGINES}
    for number in range(-2, options.rounds):  # the first two warm up
        prompts = [[rng.randrange(vocabulary) for _ in range(length)] for _ in range(requests)]
        for name, llm in list(zip(ENGINES, both))[:: 1 if number % 2 else -1]:
            waited = first_tokens(llm, prompts)
            if number >= 0:
                samples[name]["mean_s"].append(sum(waited) / len(waited))
                samples[name]["last_s"].append(max(waited))
    dense, sparse = (samples[name]["mean_s"] for name in ENGINES)
    return {"samples": samples, "speedup": stats.ratio_of_medians(dense, sparse).to_dict()}


def cells(options, directory) -> Cells:
    """The equality with transformers first, then the measurements, of the longest prompts first."""
    identities = {"check": {"check": options.check}} if options.check else {}
    for batched in sorted(options.batched, reverse=True):
        for requests in options.requests:
            for length in sorted(options.lengths, reverse=True):
                name = f"{length}x{requests}-{batched}"
                identities[name] = {"length": length, "requests": requests, "batched": batched}
    timed = {"samples": dict.fromkeys(ENGINES, SAMPLES), "speedup": {"value": float, "low": float, "high": float}}
    return Cells(
        directory / "cells", identities,
        lambda name: {"found": dict.fromkeys(ENGINES, CHECKED), "engines": dict} if name == "check" else timed,
    )  # fmt: skip


def fill(options, kept: Cells, both: list, vocabulary: int) -> None:
    """Makes the missing measurements that end in time, judged by the seconds per token of earlier ones of the same length."""
    begun, slowest = time.monotonic(), 0.0
    for name in kept.missing():
        started, what = time.monotonic(), kept.identities[name]
        tokens = what.get("length", 0) * what.get("requests", 0)
        if options.budget_s is not None and started - begun + slowest * tokens > options.budget_s:
            return
        if name == "check":
            engines = {which: described(llm) for which, llm in zip(ENGINES, both)}
            kept.write(name, {"found": checked(options, both, vocabulary), "engines": engines})
        else:
            kept.write(name, measured(options, both, vocabulary, **what))
            slowest = max(slowest, (time.monotonic() - started) / tokens)


def page(report: dict) -> str:
    """The report in markdown."""
    config, rows = report["config"], []
    for cell in report["cells"].values():
        medians = {name: stats.summary(cell["samples"][name]["mean_s"]) for name in ENGINES}
        times = {f"{name}, s": f"{one['median']:.4f} (IQR {one['iqr']:.4f})" for name, one in medians.items()}
        ratio = cell["speedup"]
        interval = f"{ratio['value']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"
        what = {"tokens": cell["length"], "requests": cell["requests"], "tokens a step": cell["batched"]}
        rows.append({**what, **times, "dense / sparse": interval})
    lines = [
        "# Time to first token in vLLM\n",
        f"Mean over a round's requests, median of {config['rounds']} interleaved rounds; budget {config['budget']}, "
        f"{config['dtype']}, {'eager' if config['eager'] else 'compiled'}, vLLM {report['vllm']}. "
        f"{machine_line(report['machine'])}\n",
        markdown_table(rows) if rows else "Nothing was measured yet.",
    ]
    check = report["check"] or {"found": {}}
    for name, one in check["found"].items():
        engine = check["engines"][name]
        lines.append(
            f"\n{name}, {engine['attention']}, model runner {engine['runner']}: {one['same']} of {len(one['tokens'])} greedy "
            f"tokens are transformers' after {config['check']} tokens; log-probabilities differ by up to "
            f"{one['logprob_difference']:.2e}."
        )
    if report["missing"]:
        lines.append(f"\nNot measured yet: {', '.join(report['missing'])}.")
    return "\n".join(lines) + "\n"


def main(arguments=None) -> int:
    options = parse(arguments)
    config = {name: value for name, value in vars(options).items() if name not in ("output", "budget_s")}
    directory = open_run(options.output, {"stage": "vllm-ttft", **config})
    kept = cells(options, directory)
    if kept.missing():
        both = engines(options)
        fill(options, kept, both, both[0].llm_engine.model_config.get_vocab_size())
    import vllm

    report = {"config": config, "vllm": vllm.__version__, "machine": machine(), "load": list(os.getloadavg())}
    done = kept.records()
    report |= {"check": done.pop("check", None), "cells": done, "missing": kept.missing()}
    write_json(directory / "report.json", report)
    write_text(directory / "report.md", page(report))
    print(page(report))
    short = {name: {key: value for key, value in cell.items() if key != "samples"} for name, cell in done.items()}
    print(json.dumps({**report, "cells": short}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
