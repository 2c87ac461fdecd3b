# What the rules share: the checked configuration, where artefacts lie, and how options are written. What they read and
# who needs what stands in common/.

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

from mcsmoe.artefacts.layout import (
    ALIGNED,
    STAGES,
    Places,
    checkpoint_pattern,
    stage_of,
)
from mcsmoe.workflow import config as configuration
from mcsmoe.workflow import compared_methods
from mcsmoe import methods
from mcsmoe.workflow import provenance
from mcsmoe.workflow import forkserver
from mcsmoe.workflow.options import as_flags
from mcsmoe.data.packages import versions as package_versions
from mcsmoe.tracking.address import store_name
from mcsmoe.workflow.provenance import digest_of
from mcsmoe.workflow.run import (
    described_in,
    hold_lock,
    is_language,
    names_by_task,
    say_when_nothing_is_planned,
    task_files,
)

say_when_nothing_is_planned()

try:
    CONFIG = configuration.complete(config)
    METHODS = compared_methods.resolve(CONFIG)
    TASKS = names_by_task(CONFIG["tasks"])
    LANGUAGE = {name for name, spec in TASKS.items() if is_language(spec)}
    STORE = store_name(CONFIG["results"])
except ValueError as error:
    raise WorkflowError(f"configuration: {error}")

RESULTS = CONFIG["results"]
PLACES = Places(RESULTS)
RUN = PLACES.run("{task}", "{seed}")
BASE = PLACES.base("{seed}")
STATE, TOKENS = PLACES.state, PLACES.tokens
DEVICE = CONFIG["device"]
GPUS = 0 if DEVICE == "cpu" else 1  # of a process
PROCESSES = CONFIG["processes"]
CONFIG_JSON = json.dumps(CONFIG, sort_keys=True)
SCRIPTS = {
    file.stem: file for file in Path(workflow.basedir, "workflow_scripts").glob("*.py")
}
# What the report is drawn with, beside code.
REPORT_FILES = [
    Path(workflow.basedir, "mcsmoe/report", name)
    for name in (
        "templates/report.html.j2",
        "published/scores.csv",
        "published/examples.csv",
    )
]
# How jobs are started: a fork of a process that has torch and transformers loaded, where the workflow keeps one; where they
# need neither, only if it has them already; a fork of a process that has nothing else loaded than what measuring takes;
# and several processes that train together. As options of the launcher.
LAUNCH = ""
LIGHT = "--light"
MEASURED = "--measured"
TOGETHER = LAUNCH if PROCESSES == 1 else f"--processes {PROCESSES}"
# Priorities: the longest trainings begin as soon as they can, and so does what they wait for, lest one of them is left for
# the end, with nothing beside it.
FIRST, LONGEST, LONG = 3, 2, 1
LAUNCHER = Path(os.path.relpath(f"{workflow.basedir}/mcsmoe/workflow/launch.py"))
CHECKPOINT = CONFIG["model"]["checkpoint"]
DENSE_CHECKPOINT = CONFIG["model"]["dense_checkpoint"]
FINETUNED = CONFIG["finetuned"] and not CONFIG["zero_shot"]
EXPERTS_IN_MODEL = configuration.num_experts(CONFIG)


wildcard_constraints:
    task="[^/]+",
    seed=r"\d+",
    variant=r"[^/]+",
    experts=r"\d+",
    how="(-weight-input|-activation)?",
    checkpoint=checkpoint_pattern(),


# Stages that select a checkpoint by how it answers.
TRAIN_ON_TASK = [stage.section for stage in STAGES if stage.trains and stage.on_task]


def code(name):
    """Digest of a stage's script and of every module it uses: a change reruns the rule."""
    return provenance.code_digest(SCRIPTS[name])


def script(name):
    """A stage's script as seen from the working folder.

    A path and not text: Snakemake compares parameters that are text, and a project that was moved must rerun nothing.
    """
    return Path(os.path.relpath(SCRIPTS[name]))


def job(name, launch=LAUNCH):
    """How a stage's script is started, and the code that its result depends on, as parameters of its rule."""
    return {
        "code": code(name),
        "launcher": LAUNCHER,
        "launch": launch,
        "script": script(name),
    }


def logs(name, job):
    """What a job says, and what it used."""
    return {
        "messages": f"{PLACES.logs}/{name}/{job}.log",
        "usage": f"{PLACES.benchmarks}/{name}/{job}.tsv",
    }


def command(options):
    """A rule's command: its script, started and logged as ``job`` and ``logs`` say, with ``options``."""
    return (
        "python -S -E {params.launcher:q} {params.launch} --usage {log.usage:q} {params.script:q} "
        f"--log {{log.messages:q}} {options}"
    )


def own(checkpoint):
    """Path of a checkpoint of the method in the wildcards, in its run."""
    return f"{{variant}}/{{experts}}e/{checkpoint}"


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


def take_lock():
    """One workflow at a time writes into the results; a dry run, which writes nothing, never comes here."""
    try:
        hold_lock(Path(RESULTS))
    except ValueError as error:
        raise WorkflowError(f"configuration: {error}")


def keep_libraries_loaded():
    """Let the jobs on this machine be forks of one process; not on accelerators, whose drivers a fork cannot share."""
    if DEVICE == "cpu" and not workflow.non_local_exec:
        planned = workflow.dag.needrun_jobs()
        forkserver.start(MEASURED in {job.rule.params.get("launch") for job in planned})


def schedule_when_jobs_end():
    """Let Snakemake look for jobs to start when one has ended, and at no other time, where all of them run on this machine.

    Its limit on jobs a second, which is always set, makes every look start a timer of a second that asks for another one, so
    that after a hundred jobs it looks a hundred times a second at the files of all jobs that could start.
    """
    if not workflow.non_local_exec:
        workflow.scheduler.job_rate_limiter = None


def show_ending():
    from mcsmoe.results.text import ending

    print(ending(Path(RESULTS)), file=sys.stderr)


include: "common/data.smk"
include: "common/methods.smk"
include: "common/measuring.smk"
