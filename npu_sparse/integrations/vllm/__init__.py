"""Sparse prefill served by vLLM, as an out-of-tree plugin: no module of vLLM is patched.

    vllm serve MODEL --load-format npu_sparse \\
        --model-loader-extra-config '{"adapter": "DIRECTORY or shipped name", "budget": "k=1024,block=64"}'

How it is wired. vLLM calls `register` in every one of its processes (entry point group `vllm.general_plugins`), which adds one
load format. Everything else follows from loading a model with it:

    options.py     what --model-loader-extra-config may say
    versions.py    the versions of vLLM that this is tested with; another one is refused in a sentence
    refusals.py    what of an engine's configuration is not supported, checked before weights are loaded
    loader.py      vLLM's own loader, and then attach
    attach.py      checks adapter, budget and checkpoint; puts an IndexBranch beside every full-attention layer of this rank
    branch.py      the branch: hidden states -> index queries and keys (a hook and a custom op); pages -> support -> output
    key_cache.py   index keys in pages of vLLM's own block manager, so that prefix caching, preemption and eviction hold
    backend.py     a subclass of whichever attention backend vLLM selected; it runs the requests of a Plan sparse
    prompts.py     how long the prompts of a batch are, which decides where `exact_last` is; worker.py says it of the older runner
    scheduler.py   ends chunks where a prompt in one piece has the ends of its blocks; chunks.py says where that is
    plan.py        which requests of a batch run sparse, from the host's copy of the batch: no device synchronisation
    ascend.py      what is different under vLLM-Ascend; written from its sources, not run on a card
    pages.py       keys and values of one request out of a backend's pages

Only this package's own files that vLLM must subclass import vllm: `options`, `versions`, `refusals`, `prompts`, `chunks`,
`plan` and `pages` do not.
"""


def register() -> None:
    """Adds the load format `npu_sparse`. vLLM calls it in every process, several times in some.

    It never raises, for it also runs where vLLM serves dense: an untested version is refused by the loader, when it is asked for.
    """
    try:
        from .loader import register_loader
    except ImportError as error:  # a vLLM whose loaders are somewhere else
        import logging

        from .versions import explained

        logging.getLogger(__name__).warning("%s (%s)", explained(), error)
    else:
        register_loader()
