"""The worker of `--worker-cls`: it tells attention how long the prompts of the older model runner's batches are."""

from vllm.platforms import current_platform

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker


class Worker(PlatformWorker):
    """vLLM's own worker. Under Model Runner V2 it changes nothing."""

    def load_model(self, *args, **kwargs):
        super().load_model(*args, **kwargs)
        runner = self.model_runner
        if not hasattr(runner, "input_batch"):
            return
        layers = self.vllm_config.compilation_config.static_forward_context.values()
        branch = next((layer.npu_sparse for layer in layers if hasattr(layer, "npu_sparse")), None)
        if branch is not None:  # a dense engine has none, and a pipeline stage may
            branch.attached.prompts.source = lambda: runner.input_batch.num_prompt_tokens.tolist()
