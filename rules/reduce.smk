# Its groups are those of layers reduced one after another, not groups made from routing statistics.
ruleorder: reduce > group
ruleorder: reduce > merge


rule reduce:
    # Prune or merge layer after layer, each on what the reduced ones before it give; refit what is left, round it.
    input:
        model=RUN.full,
        train=RUN.examples("train"),
        routing=budget_input,
    output:
        model=directory(RUN.checkpoint(own("merged"))),
        groups=RUN.groups("{variant}", "{experts}"),
    log:
        **logs("reduce", "{task}-seed{seed}-{variant}-{experts}e"),
    wildcard_constraints:
        variant="|".join(map(re.escape, IN_SEQUENCE)) or "(?!)",
    priority: FIRST
    conda:
        "../envs/mcsmoe.yaml"
    threads: CONFIG["calibration"]["threads"]
    resources:
        mem_mb=3000,
        runtime=240,
        gpu=GPUS,
    params:
        **job("reduce"),
        device=DEVICE,
        tokens=TOKENS,
        given=given("routing"),
        method=method_options(
            *(
                "criterion",
                "dropped",
                "novice_rank",
                "refit",
                "refit_target",
                "bits",
                "merge",
                "similarity",
            ),
            *("grouping", "budget", "linkage", "alignment", "capacity"),
        ),
        mixture=mixture_of,
        calibration=options("calibration"),
        excluded=as_flags({"exclude_layers": CONFIG["merge"]["exclude_layers"]}),
        limits=limits(),
    message:
        "reduce the experts of {wildcards.task} by {wildcards.variant} to {wildcards.experts}, seed {wildcards.seed}"
    shell:
        command(
            "--model {input.model:q} --train {input.train:q} --seed {wildcards.seed} --device={params.device:q} "
            "--experts {wildcards.experts} --out {output.model:q} --groups {output.groups:q} "
            "--tokens {params.tokens:q} {params.limits} {params.calibration} {params.method} {params.mixture} "
            "{params.excluded} {params.given}"
        )
