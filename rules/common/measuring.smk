# What is measured of every run, and under which names it is reported.

# The Gram matrices of inputs are large, so they are collected only for the methods that need them.
CONFIGURED = [METHODS[variant] for variant in CONFIG["variants"]]
TASK_SPECIFIC = [
    name for name, method in METHODS.items() if method.merge == methods.TASK_SPECIFIC
]
IN_SEQUENCE = [name for name, method in METHODS.items() if method.in_sequence]
NEEDED = frozenset().union(*(method.needs for method in CONFIGURED))
EXTRAS = ["--whiten"] if "input-gram" in NEEDED else []
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
    names = as_flags(
        {
            "variant": variant,
            "experts": experts,
            "stage": wildcards.checkpoint.rpartition("/")[2],
        }
    )
    return f"{names} --dense" if METHODS[variant].dense else names


def budget_input(wildcards):
    """Routing statistics, where experts are spread over the layers by them."""
    run = PLACES.run(wildcards.task, wildcards.seed)
    return [] if METHODS[wildcards.variant].budget == "uniform" else run.statistics


def mixture_of(wildcards):
    """Shares of the domains in the calibration of a method, as a command-line option."""
    mixture = METHODS[wildcards.variant].mixture
    return (
        ""
        if mixture is None
        else as_flags({"mixture": json.dumps(mixture, sort_keys=True)})
    )


def evaluation_reference(wildcards):
    """The full model, which a model that predicts texts is compared with."""
    if wildcards.task not in LANGUAGE:
        return {}
    return {"reference": PLACES.run(wildcards.task, wildcards.seed).full}


def bits_of(wildcards):
    """Bits that a method rounded weights to, as a command-line option."""
    return as_flags({"bits": METHODS[LABELS[wildcards.checkpoint][0]].bits})


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
        found["training"].append(PLACES.pretraining(seed))
        if any(method.dense for method in CONFIGURED):
            found["training"].append(PLACES.pretraining(seed, dense=True))
        for task in TASKS:
            run = PLACES.run(task, seed)
            found["routing"].append(run.routing)
            for variant, experts, checkpoint in evaluated():
                for kind in ("predictions", "metrics", "cost"):
                    found[kind].append(run.table(checkpoint, kind))
                trained = checkpoint != methods.FULL or FINETUNED
                if trained and stage_of(checkpoint).trains:
                    found["training"].append(run.table(checkpoint, "training"))
                if METHODS[variant].reduces:
                    found["groups"].append(run.groups(variant, experts))
    return {name: sorted(set(paths)) for name, paths in found.items()}
