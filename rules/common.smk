# What the rules share: the checked configuration, where artefacts lie, and who needs what.

import json
import os
import re
import shlex
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

# The jobs use the interpreter and the library that the workflow was started with.
os.environ.update(
    {
        "PATH": os.pathsep.join(
            [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
        ),
        "PYTHONPATH": os.pathsep.join(
            filter(None, [workflow.basedir, os.environ.get("PYTHONPATH", "")])
        ),
    }
)
if workflow.basedir not in sys.path:
    sys.path.insert(0, workflow.basedir)

from mcsmoe import config as configuration
from mcsmoe import methods, provenance
from mcsmoe.options import as_flags, launcher
from mcsmoe.workflow import described_in, hold_lock, names_by_task, task_files

try:
    CONFIG = configuration.complete(config)
    METHODS = methods.resolve(CONFIG)
    TASKS = names_by_task(CONFIG["tasks"])
except ValueError as error:
    raise WorkflowError(f"configuration: {error}")

RESULTS = CONFIG["results"]
LOGS = f"{RESULTS}/logs"
BENCHMARKS = f"{RESULTS}/benchmarks"
DEVICE = CONFIG["device"]
GPUS = 0 if DEVICE == "cpu" else 1  # of a process
PROCESSES = CONFIG["processes"]
LAUNCH = launcher(PROCESSES)
CONFIG_JSON = json.dumps(CONFIG, sort_keys=True)
RUN = f"{RESULTS}/{{task}}/seed{{seed}}"
STATE = f"{RESULTS}/.state"
TOKENS = f"{STATE}/tokens"
SCRIPTS = f"{workflow.basedir}/workflow_scripts"
EXPERTS_IN_MODEL = configuration.num_experts(CONFIG)


wildcard_constraints:
    task="[^/]+",
    seed=r"\d+",
    variant=r"[^/]+",
    experts=r"\d+",
    how="(-weight-input|-activation)?",
    checkpoint=r"full|[^/]+/\d+e/(merged|pruned|recovered|compressed)",


# Stages that select a checkpoint by how it answers.
TRAIN_ON_TASK = ("finetune", "recover", "compress")


def code(name):
    """Digest of a stage's script and of every module it uses: a change reruns the rule."""
    return provenance.code_digest(f"{SCRIPTS}/{name}.py")


def script(name):
    """A stage's script as seen from the working folder, so that a project that was moved reruns nothing."""
    return os.path.relpath(f"{SCRIPTS}/{name}.py")


def options(section, **changes):
    """Settings of a section of the configuration as command-line options, with the task's own first."""

    def made(wildcards):
        settings = configuration.stage_settings(
            CONFIG, section, getattr(wildcards, "task", None)
        )
        if section in TRAIN_ON_TASK:
            settings = {**settings, "protocol": CONFIG["evaluate"]["protocol"]}
        return as_flags({**settings, **changes})

    return made


def method_options(*keys):
    """Settings of the method in the wildcards as command-line options."""

    def made(wildcards):
        return as_flags({key: getattr(METHODS[wildcards.variant], key) for key in keys})

    return made


def given(*names):
    """Inputs that are there for some wildcards only, as command-line options."""

    def made(wildcards, input):
        return as_flags(
            {
                name: str(input[name])
                for name in names
                if name in input.keys() and input[name]
            }
        )

    return made


def limits():
    """Longest input and target, in tokens, as command-line options."""
    return as_flags({key: CONFIG["data"][key] for key in ("max_input", "max_label")})


# -- data and the base model ---------------------------------------------------------------------------------------
def raw_data(wildcards):
    """The task's own file, and the files its rows are read from; no rows' where they come from the hub."""
    source, task = CONFIG["data"]["source"], TASKS[wildcards.task]
    described = {"described": str(described_in(task))}
    if source == "hub":
        return described
    if source == "synthetic":
        return described | {
            split: f"{RESULTS}/data/{wildcards.task}/{split}.parquet"
            for split in ("train", "validation")
        }
    return described | {
        split: str(path)
        for split, path in task_files(CONFIG["data"]["folder"], task).items()
    }


def data_options(*keys):
    """Settings of the data, with the task's own first, as command-line options."""

    def made(wildcards):
        settings = configuration.stage_settings(CONFIG, "data", wildcards.task)
        return as_flags({key: settings[key] for key in keys})

    return made


def raw_source(wildcards, input):
    """Where prepare_data reads, as command-line options."""
    if CONFIG["data"]["source"] == "hub":
        return "--hub"
    return shlex.join(
        ["--train-file", str(input.train), "--validation-file", str(input.validation)]
    )


def pretraining_input(wildcards):
    """Files of the corpus, and the tasks' examples where their text is trained on."""
    found = {}
    if CONFIG["model"]["checkpoint"] is None:
        if CONFIG["pretrain"]["corpus"] == "files":
            found["corpus"] = CONFIG["pretrain"]["files"]
        if CONFIG["pretrain"]["task_text"]:
            found["examples"] = [
                f"{RESULTS}/{task}/seed{wildcards.seed}/examples/train.parquet"
                for task in TASKS
            ]
    elif Path(CONFIG["model"]["checkpoint"]).is_dir():
        found["checkpoint"] = CONFIG["model"]["checkpoint"]
    return found


def model_source(wildcards, input):
    """The checkpoint to take, or what a model is built and pre-trained from, as command-line options."""
    if CONFIG["model"]["checkpoint"] is not None:
        return shlex.join(["--checkpoint", CONFIG["model"]["checkpoint"]])
    words = ["--corpus-seed", str(CONFIG["data"]["seed"])]
    if "examples" in input.keys():
        words += [
            "--examples",
            *([input.examples] if isinstance(input.examples, str) else input.examples),
        ]
    return shlex.join(words)


def pretraining_options(wildcards):
    """Architecture, tokenizer and pre-training settings as command-line options; none for a given checkpoint."""
    if CONFIG["model"]["checkpoint"] is not None:
        return ""
    model = CONFIG["model"]
    parts = [
        {"architecture": json.dumps(model["architecture"], sort_keys=True)},
        {key: model[key] for key in ("near_heads", "residual_scale")},
        model["tokenizer"],
        CONFIG["pretrain"],
    ]
    return " ".join(
        as_flags({key: value for key, value in part.items() if key != "task_text"})
        for part in parts
    )


# -- methods -------------------------------------------------------------------------------------------------------
def experts_of(variant):
    """For how many experts on average a variant is run."""
    method = METHODS[variant]
    if method.merge is None and method.parent is None:
        return [EXPERTS_IN_MODEL or 0]
    return CONFIG["experts"]


def checkpoints_of(variant, experts):
    """Checkpoints of a variant, relative to its run; the last is its result."""
    if variant == methods.FULL:
        return ["full"]
    return [
        f"{variant}/{experts}e/{stage}" for stage in methods.stages(METHODS[variant])
    ]


def evaluated():
    """(variant, experts, checkpoint) of everything that is scored and measured in one run."""
    found = []
    for variant in CONFIG["variants"]:
        for experts in experts_of(variant):
            made = checkpoints_of(variant, experts)
            if CONFIG["evaluate"]["stages"] == "final":
                made = made[-1:]
            found += [(variant, experts, checkpoint) for checkpoint in made]
    return found


def layer_alignment(variant):
    """The alignment of all experts to expert 0 that a method starts from, as the suffix of its folder; None without."""
    alignment = METHODS[variant].alignment
    return {
        "weight": "",
        "weight-input": "-weight-input",
        "activation": "-activation",
    }.get(alignment)


def alignment_input(wildcards):
    """The full model, and the tokens of its calibration where activations are compared."""
    run = f"{RESULTS}/{wildcards.task}/seed{wildcards.seed}"
    routing = f"{run}/routing.safetensors" if wildcards.how == "-activation" else []
    return {"model": f"{run}/full", "routing": routing}


def grouping_input(wildcards):
    """The model whose experts are grouped and merged, its routing statistics and, where asked for, gradients."""
    run = f"{RESULTS}/{wildcards.task}/seed{wildcards.seed}"
    how = layer_alignment(wildcards.variant)
    return {
        "model": f"{run}/full" if how is None else f"{run}/permuted{how}",
        "permutation": [] if how is None else f"{run}/permutation{how}.parquet",
        "routing": f"{run}/routing.safetensors",
        "gradients": (
            f"{run}/gradients.safetensors"
            if METHODS[wildcards.variant].needs_gradients
            else []
        ),
    }


def grouping_options(wildcards):
    """Settings shared by all methods that group; a method's own capacity comes first."""
    merge = CONFIG["merge"]
    capacity = METHODS[wildcards.variant].capacity or merge["capacity"]
    return as_flags({**merge, "capacity": capacity})


def before_recovery(wildcards):
    """The model that recovery starts from: merged, or pruned while it was fine-tuned."""
    run = f"{RESULTS}/{wildcards.task}/seed{wildcards.seed}"
    made = methods.stages(METHODS[wildcards.variant])[0]
    return f"{run}/{wildcards.variant}/{wildcards.experts}e/{made}"


def before_compression(wildcards):
    """The model that compression starts from: the parent's result, this method's own merged one, or the full one."""
    method = METHODS[wildcards.variant]
    run = f"{RESULTS}/{wildcards.task}/seed{wildcards.seed}"
    if method.parent is not None:
        return f"{run}/{checkpoints_of(method.parent, wildcards.experts)[-1]}"
    own = [stage for stage in methods.stages(method) if stage != "compressed"]
    return (
        f"{run}/{wildcards.variant}/{wildcards.experts}e/{own[-1]}"
        if own
        else f"{run}/full"
    )


def teacher(section):
    """The teacher's cache, where the stage distils from it."""

    def made(wildcards):
        weight = METHODS[wildcards.variant].distillation_weight
        weight = (
            configuration.stage_settings(CONFIG, section, wildcards.task)[
                "distillation_weight"
            ]
            if weight is None
            else weight
        )
        return (
            [f"{RESULTS}/{wildcards.task}/seed{wildcards.seed}/teacher"]
            if weight
            else []
        )

    return made


def whitening_input(wildcards):
    """Routing statistics, where the decomposition weighs inputs by how often they occur."""
    run = f"{RESULTS}/{wildcards.task}/seed{wildcards.seed}"
    return (
        f"{run}/routing.safetensors"
        if METHODS[wildcards.variant].decomposition == "whitened"
        else []
    )


# -- measuring -----------------------------------------------------------------------------------------------------
# What only some methods need of the calibration pass is collected only for them.
CONFIGURED = [METHODS[variant] for variant in CONFIG["variants"]]
TASK_SPECIFIC = [
    name for name, method in METHODS.items() if method.merge == methods.TASK_SPECIFIC
]
EXTRAS = []
if any(method.decomposition == "whitened" for method in CONFIGURED):
    EXTRAS.append("--whiten")
if any(method.merge == "reap" for method in CONFIGURED):
    EXTRAS.append("--saliency")
LABELS = {made: (variant, experts) for variant, experts, made in evaluated()}
RUN_LIST = json.dumps(
    [
        {
            "task": task,
            "seed": seed,
            "variant": variant,
            "experts": experts,
            "checkpoint": checkpoint,
        }
        for task in TASKS
        for seed in CONFIG["seeds"]
        for variant, experts, checkpoint in evaluated()
    ]
)


def labels_of(wildcards):
    """Variant, experts and stage of a checkpoint, for the columns of its tables, as command-line options."""
    variant, experts = LABELS[wildcards.checkpoint]
    return as_flags(
        {
            "variant": variant,
            "experts": experts,
            "stage": wildcards.checkpoint.rpartition("/")[2],
        }
    )


def everything_measured(wildcards):
    """Scores, costs, curves and groupings of every run."""
    found = {
        "predictions": [],
        "metrics": [],
        "cost": [],
        "training": [],
        "routing": [],
        "groups": [],
    }
    for seed in CONFIG["seeds"]:
        found["training"].append(f"{RESULTS}/base/seed{seed}/training.parquet")
        for task in TASKS:
            run = f"{RESULTS}/{task}/seed{seed}"
            found["routing"].append(f"{run}/routing.parquet")
            for variant, experts, checkpoint in evaluated():
                found["predictions"].append(
                    f"{run}/{checkpoint}_evaluation/predictions.parquet"
                )
                found["metrics"].append(
                    f"{run}/{checkpoint}_evaluation/metrics.parquet"
                )
                found["cost"].append(f"{run}/{checkpoint}_cost/cost.parquet")
                trained = checkpoint != methods.FULL or not CONFIG["zero_shot"]
                if trained and Path(checkpoint).name != "merged":
                    found["training"].append(
                        f"{run}/{checkpoint}_training/training.parquet"
                    )
                if METHODS[variant].merge is not None:
                    found["groups"].append(f"{run}/{variant}/{experts}e/groups.parquet")
    return {name: sorted(set(paths)) for name, paths in found.items()}


def take_lock():
    """One workflow at a time writes into the results; a dry run, which writes nothing, never comes here."""
    try:
        hold_lock(Path(RESULTS))
    except ValueError as error:
        raise WorkflowError(f"configuration: {error}")


def show_ending():
    from mcsmoe.workflow import ending

    print(ending(Path(RESULTS)), file=sys.stderr)
