# Which checkpoints a method makes, and what each of its stages starts from.


def experts_of(variant):
    """For how many experts on average a variant is run."""
    method = METHODS[variant]
    if method.dense:
        return [1]
    if not method.fewer:
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
    return ALIGNED.get(METHODS[variant].alignment)


def alignment_input(wildcards):
    """The full model, and the tokens of its calibration where activations are compared."""
    run = PLACES.run(wildcards.task, wildcards.seed)
    routing = run.statistics if wildcards.how == "-activation" else []
    return {"model": run.full, "routing": routing}


def grouping_input(wildcards):
    """The model whose experts are grouped and merged, its routing statistics and, where asked for, gradients."""
    run = PLACES.run(wildcards.task, wildcards.seed)
    how = layer_alignment(wildcards.variant)
    return {
        "model": run.full if how is None else run.permuted(how),
        "permutation": [] if how is None else run.permutation(how),
        "routing": run.statistics,
        "gradients": (
            run.gradients if METHODS[wildcards.variant].needs_gradients else []
        ),
    }


def grouping_options(wildcards):
    """Settings shared by all methods that group; a method's own capacity comes first."""
    merge = CONFIG["merge"]
    capacity = METHODS[wildcards.variant].capacity or merge["capacity"]
    return as_flags({**merge, "capacity": capacity})


def before_recovery(wildcards):
    """The model that recovery starts from: merged, or pruned while it was fine-tuned."""
    run = PLACES.run(wildcards.task, wildcards.seed)
    made = methods.stages(METHODS[wildcards.variant])[0]
    return run.checkpoint(f"{wildcards.variant}/{wildcards.experts}e/{made}")


def before_compression(wildcards):
    """The model that compression starts from: the parent's result, this method's own merged one, or the full one."""
    method = METHODS[wildcards.variant]
    run = PLACES.run(wildcards.task, wildcards.seed)
    if method.parent is not None:
        return run.checkpoint(checkpoints_of(method.parent, wildcards.experts)[-1])
    made = [stage for stage in methods.stages(method) if stage != "compressed"]
    return (
        run.checkpoint(f"{wildcards.variant}/{wildcards.experts}e/{made[-1]}")
        if made
        else run.full
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
        return [PLACES.run(wildcards.task, wildcards.seed).teacher] if weight else []

    return made


def students(wildcards):
    """How much of the training set the stages see that learn from the teacher, JSON."""
    used = [METHODS[variant] for variant in CONFIG["variants"]]
    used += [METHODS[method.parent] for method in used if method.parent is not None]
    made = {stage for method in used for stage in methods.stages(method)}
    asked = []
    for stage, section in (("recovered", "recover"), ("compressed", "compress")):
        settings = configuration.stage_settings(CONFIG, section, wildcards.task)
        if stage in made:
            asked.append(
                {key: settings[key] for key in ("steps", "epochs", "batch_size")}
            )
    return json.dumps(asked)


def whitening_input(wildcards):
    """Routing statistics, where the decomposition weighs inputs by how often they occur."""
    run = PLACES.run(wildcards.task, wildcards.seed)
    return run.statistics if "input-gram" in METHODS[wildcards.variant].needs else []
