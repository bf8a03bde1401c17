"""Our tasks as a folder for lm-eval's `--include_path`: prompts as JSON beside the YAML that reads them, nothing downloaded.

Prompts are made once, with one model's tokenizer, so that every model, engine and budget answers the same text. This file imports
no lm-eval: only the folder's own prompts.py is read by it.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .. import tasks
from ..runs.store import open_stage, write_json, write_text
from ..tasks.catalogue import task_named

PROMPTS_FILE = "npu_sparse_prompts"  # lm-eval hands model arguments to the same function: none is called so
PROMPTS_PY = '''"""What the YAML files beside this one call; written by `npu-sparse lm-eval-tasks`."""

from pathlib import Path

from npu_sparse.integrations.lm_eval_tasks import PROMPTS_FILE, dataset, scored  # noqa: F401


def prompts(**options):
    return dataset(Path(__file__).parent / options[PROMPTS_FILE])
'''


@dataclass(frozen=True)
class LmEvalTasksConfig:
    """Which prompts are written, and for whom.

    Attributes:
        model: hub id, directory, GGUF file or demo name: whose tokenizer sizes the prompts.
        tasks: names of RULER's tasks or of those after other benchmarks; question answering needs its file in `qa_files`.
        lengths: tokens of prompt and answer together; a task a length.
        count: prompts of a task.
        seed: of the prompts.
        max_new_tokens: for all tasks in place of their own, or None.
        chat: whether questions go through the tokenizer's chat template here; run lm-eval without its own then.
        texts: sources of the haystacks, see `tasks.texts.documents`.
        qa_files: `{"qa_1": path, "qa_2": path}`.
    """

    model: str
    tasks: tuple[str, ...] = tasks.task_names("qa_file")
    lengths: tuple[int, ...] = (4096,)
    count: int = 50
    seed: int = 0
    max_new_tokens: int | None = None
    chat: bool = False
    texts: tuple[str, ...] = ("builtin",)
    qa_files: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self):
        for name, kind in (("tasks", str), ("lengths", int), ("texts", str)):
            value = getattr(self, name)
            value = tuple(map(kind, (value,) if isinstance(value, (str, int)) else value))
            object.__setattr__(self, name, value)
            if not value or len(set(value)) != len(value):
                raise ValueError(f"{name} must name each value once, got {', '.join(map(str, value)) or 'none'}")
        for task in self.tasks:
            if task_named(task).needs == "qa_file" and task not in self.qa_files:
                raise ValueError(f"{task} needs a question file: set qa_files[{task!r}] to its path")
        for name, values in (("lengths", self.lengths), ("count", (self.count,))):
            for value in values:
                if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                    raise ValueError(f"{name} must be a positive integer, got {value!r}")

    def to_dict(self) -> dict:
        """Plain JSON types; `from_dict` reads them back."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, data: Mapping) -> "LmEvalTasksConfig":
        """The config that `to_dict` wrote; unknown fields are refused."""
        if unknown := set(data) - set(cls.__dataclass_fields__):
            raise ValueError(f"lm-eval tasks' config must have known fields only, got {', '.join(sorted(unknown))}")
        return cls(**data)


def write_lm_eval_tasks(config: LmEvalTasksConfig, output, *, tokenizer=None) -> dict:
    """`{"tasks": their names in lm-eval}`; writes a folder for `--include_path`, which may be moved.

    A task called `vt` is `npu_sparse_vt_4096` at 4096 tokens; tags `npu_sparse` and `npu_sparse_4096` name all and those of a
    length. A folder of the same config is written again, any other refused (RunError).

    Args:
        tokenizer: used in place of loading that of `config.model`.

    Raises ValueError where a length is too short for a task, CheckpointError, FileNotFoundError.
    """
    directory = open_stage(output, "lm-eval-tasks", config)
    if tokenizer is None:
        from ..checkpoints import load_tokenizer

        tokenizer = load_tokenizer(config.model)
    needs_text = any(task_named(task).needs == "haystack" for task in config.tasks)
    haystack = tasks.documents(config.texts) if needs_text else None
    names = []
    for length in config.lengths:
        for task in config.tasks:
            known, name = task_named(task), f"npu_sparse_{task}_{length}"
            examples = tasks.generate(
                task, tokenizer, length=length, count=config.count, seed=config.seed, chat=config.chat,
                haystack=haystack if known.needs == "haystack" else None, qa_file=config.qa_files.get(task),
                max_new_tokens=config.max_new_tokens,
            )  # fmt: skip
            write_json(directory / f"{name}.json", [asdict(example) for example in examples])
            write_text(directory / f"{name}.yaml", _yaml(name, known, length, config))
            names.append(name)
    write_text(directory / "prompts.py", PROMPTS_PY)
    return {"tasks": names}


def dataset(path: Path) -> dict:
    """The prompts of a task as lm-eval takes them: `{"test": datasets.Dataset}`."""
    from datasets import Dataset

    return {"test": Dataset.from_list(json.loads(Path(path).read_text()))}


def scored(document: Mapping, outputs: list[str]) -> dict:
    """`{"score": ...}` of the first output, by the rule of the document's task."""
    return {"score": task_named(document["task"]).rule(tuple(document["answers"]), outputs[0])}


def _yaml(name: str, task: tasks.Task, length: int, config: LmEvalTasksConfig) -> str:
    new_tokens = task.max_new_tokens if config.max_new_tokens is None else config.max_new_tokens
    label = f" ({task.label})" if task.label else ""
    return f"""\
# {task.summary}{label}
task: {name}
tag: [npu_sparse, npu_sparse_{length}]
output_type: generate_until
dataset_path: ""
custom_dataset: !function prompts.prompts
dataset_kwargs: {{{PROMPTS_FILE}: {name}.json}}
test_split: test
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answers}}}}"
target_delimiter: ""
process_results: !function prompts.scored
generation_kwargs: {{do_sample: false, max_gen_toks: {new_tokens}, until: []}}
metric_list:
  - {{metric: score, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
