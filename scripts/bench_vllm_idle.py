#!/usr/bin/env python3
"""What does the plugin cost vLLM where nothing runs sparse?

    python scripts/bench_vllm_idle.py --model path/to/checkpoint --adapter path/to/adapter --output runs/vllm-idle

Two engines in one process, vLLM's own and one with the plugin whose `dense_below` exceeds every context, serve the same requests
round by round and take turns at being first. Prompts are random and new in every round. All that the plugin then does is one
projection a layer and token, and writing its index key to a page. There are fewer requests than `--seqs`, so that no engine is
saturated: a round's time is work, not waiting.

The report has the time of a round and the process's processor time in it, which is meaningful on a shared machine too. Prints a
table, then one JSON line; writes report.json and report.md to --output.
"""

import argparse
import json
import os
import random
import sys
import time

from npu_sparse.runs import stats
from npu_sparse.runs.machine import machine, machine_line
from npu_sparse.runs.page import markdown_table
from npu_sparse.runs.store import open_run, write_json, write_text

NEVER = "dense_below=1000000000"
ENGINES = ("vLLM", "with the plugin")


def parse(arguments) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory or hub id of a checkpoint")
    parser.add_argument("--adapter", required=True, help="directory of its adapter, or the name of a shipped one")
    parser.add_argument("--dtype", default="float32", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--requests", default=4, type=int, help="of a round, all at once")
    parser.add_argument("--seqs", default=8, type=int, help="sequences that an engine may hold")
    parser.add_argument("--prompt", default=256, type=int, help="tokens of a prompt")
    parser.add_argument("--new", default=32, type=int, help="tokens written after it")
    parser.add_argument("--rounds", default=12, type=int)
    parser.add_argument("--compiled", action="store_true", help="torch.compile and graphs, as vLLM does by default")
    parser.add_argument("--output", required=True)
    options = parser.parse_args(arguments)
    for name in ("requests", "seqs", "prompt", "new", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"{name} must be >= 1, got {getattr(options, name)}")
    if options.requests >= options.seqs:
        parser.error(f"requests must be fewer than seqs, got {options.requests} and {options.seqs}")
    return options


def engines(options) -> list:
    """Both engines, in this process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import vllm

    from npu_sparse.integrations.vllm import register

    register()
    common = dict(
        dtype=options.dtype, max_model_len=options.prompt + options.new, max_num_seqs=options.seqs, seed=0,
        enable_prefix_caching=False, enforce_eager=not options.compiled, skip_tokenizer_init=True, disable_log_stats=True,
        gpu_memory_utilization=0.4,
    )  # fmt: skip
    sparse = dict(load_format="npu_sparse", model_loader_extra_config={"adapter": options.adapter, "budget": NEVER})
    return [vllm.LLM(options.model, **common), vllm.LLM(options.model, **common, **sparse)]


def served(engine, prompts: list[list[int]], new: int) -> tuple[list, float, float]:
    """`(tokens written, seconds, seconds of the processor)` of a round."""
    from vllm import SamplingParams

    greedy = SamplingParams(max_tokens=new, temperature=0, detokenize=False, ignore_eos=True)
    cpu, wall = time.process_time(), time.perf_counter()
    outputs = engine.generate([{"prompt_token_ids": one} for one in prompts], greedy, use_tqdm=False)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return [list(one.outputs[0].token_ids) for one in outputs], wall, cpu


def measure(options, both: list) -> dict:
    """The rounds of both engines, as a report. Raises RuntimeError where they write different tokens."""
    vocabulary = both[0].llm_engine.model_config.get_vocab_size()
    rng = random.Random(0)
    samples = {name: {"wall_s": [], "cpu_s": []} for name in ENGINES}
    for number in range(-1, options.rounds):  # the first is a warm-up
        prompts = [[rng.randrange(vocabulary) for _ in range(options.prompt)] for _ in range(options.requests)]
        written = {}
        for name, engine in list(zip(ENGINES, both))[:: 1 if number % 2 else -1]:
            written[name], wall, cpu = served(engine, prompts, options.new)
            if number >= 0:
                samples[name]["wall_s"].append(wall)
                samples[name]["cpu_s"].append(cpu)
        if written[ENGINES[0]] != written[ENGINES[1]]:
            raise RuntimeError(f"both engines must write the same tokens, got others in round {number}")
    ratios = {
        clock: stats.ratio_of_medians(samples[ENGINES[1]][clock], samples[ENGINES[0]][clock]).to_dict()
        for clock in ("wall_s", "cpu_s")
    }
    import vllm

    return {
        "config": {name: value for name, value in vars(options).items() if name != "output"}, "vllm": vllm.__version__,
        "machine": machine(), "load": list(os.getloadavg()), "samples": samples, "ratio": ratios,
    }  # fmt: skip


def page(report: dict) -> str:
    """The report in markdown."""
    rows, config = [], report["config"]
    for clock, title in (("wall_s", "time"), ("cpu_s", "processor time")):
        summaries = {name: stats.summary(report["samples"][name][clock]) for name in ENGINES}
        ratio = report["ratio"][clock]
        cells = {name: f"{one['median']:.3f} s (IQR {one['iqr']:.3f})" for name, one in summaries.items()}
        interval = f"{ratio['value']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"
        rows.append({"a round": title, **cells, "ratio of medians": interval})
    how = "compiled" if config["compiled"] else "eager"
    return (
        "# vLLM with the plugin, where nothing runs sparse\n\n"
        f"{config['requests']} requests of {config['prompt']} + {config['new']} tokens a round, {config['rounds']} interleaved "
        f"rounds; vLLM {report['vllm']}, {how}, {config['dtype']}; load {report['load'][0]:.1f} at the end. "
        f"{machine_line(report['machine'])}\n\n{markdown_table(rows)}\n"
    )


def main(arguments=None) -> int:
    options = parse(arguments)
    config = {name: value for name, value in vars(options).items() if name != "output"}
    directory = open_run(options.output, {"stage": "vllm-idle", **config})
    report = measure(options, engines(options))
    write_json(directory / "report.json", report)
    write_text(directory / "report.md", page(report))
    print(page(report))
    print(json.dumps({name: value for name, value in report.items() if name != "samples"}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
