#!/usr/bin/env python3
"""Are there races in gather attention on Hopper? Runs it under compute-sanitizer's racecheck, and once with a race planted.

    python scripts/racecheck.py

Slots of shared memory are handed back through mbarriers. In the shipped kernel one thread arrives for its warp, after __syncwarp;
racecheck (version 2025.3.1) does not follow that and reports races between the copies into a slot and the warp's earlier reads.
So the check runs the same kernel with all 32 threads arriving: then nothing may be reported. To show that the check can fail,
each of two waits is left out in turn, and the tool must report a race. Exit status 0: clean, and both planted races reported.
"""

import argparse
import subprocess
import sys

CASES = {  # query heads, KV heads, dimension, block, tail
    "shared": (8, 2, 256, 64, False),
    "two streams": (8, 2, 256, 16, False),
    "union": (8, 2, 256, 1, False),
    "dimension 64": (9, 3, 64, 64, False),
    "dimension 128": (16, 4, 128, 16, False),
    "tail": (8, 2, 256, 64, True),
    "union with a tail": (8, 2, 256, 1, True),
}
TOOL = ("compute-sanitizer", "--tool", "racecheck", "--print-limit", "4", "--kernel-name",
        "kernel_substring=attend_supports")  # fmt: skip
LIMIT_S = 120


def run(planted: int, names: list[str]) -> None:
    """Gather attention of these cases, every key of 300 selected: more steps than slots."""
    import torch

    from npu_sparse import ops
    from npu_sparse.ops.sparse_attention import hopper
    from npu_sparse.testing import attention_inputs, random_support

    hopper.ARRIVING, hopper.PLANTED = 32, planted
    for name in names:
        Hq, Hkv, D, block, tail = CASES[name]
        q, k, v = attention_inputs(1, Hq, Hkv, 300, 900, D, dtype=torch.bfloat16, device="cuda")
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
        support = random_support(1, 1, 300, 900, k=800, block=block, device="cuda")
        attend = ops.sparse_attention_with_tail if tail else ops.sparse_attention
        attend(q, k, v, support, scale=0.06, impl="kernel")
        torch.cuda.synchronize()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--planted", type=int, help=argparse.SUPPRESS)  # for the process that the tool watches
    args = parser.parse_args()
    if args.planted is not None:
        run(args.planted, list(CASES) if args.planted == 0 else ["shared"])
        return 0
    failed = False
    for planted, wanted in ((0, "nothing"), (1, "a race"), (2, "a race")):
        command = (*TOOL, sys.executable, __file__, "--planted", str(planted))
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
            output, status = done.stdout, done.returncode
        except subprocess.TimeoutExpired as stopped:  # with a wait left out the kernel may never end
            output, status = (stopped.stdout or b"").decode(), None
        reported = "Race reported" in output or "hazard detected" in output
        right = reported if planted else status == 0 and not reported
        failed |= not right
        what = ("as shipped", "without the wait for an empty slot", "without the wait for a full slot")[planted]
        print(f"{what}: {'a race' if reported else 'nothing'} reported, {wanted} expected")
        if not right:
            print(output[-2000:])
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
