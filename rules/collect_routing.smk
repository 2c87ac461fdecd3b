rule collect_routing:
    # One streaming pass over calibration examples: what each expert receives, and what every similarity needs.
    input:
        model=RUN.full,
        train=RUN.examples("train"),
    output:
        table=RUN.routing,
        statistics=RUN.statistics,
    log:
        **logs("collect_routing", "{task}-seed{seed}"),
    priority: FIRST
    conda:
        "../envs/mcsmoe.yaml"
    threads: CONFIG["calibration"]["threads"]
    resources:
        mem_mb=3000,
        runtime=120,
        gpu=GPUS,
    params:
        **job("collect_routing"),
        device=DEVICE,
        tokens=TOKENS,
        options=options("calibration"),
        limits=limits(),
        extras=" ".join(EXTRAS),
    message:
        "collect routing statistics of {wildcards.task}, seed {wildcards.seed}"
    shell:
        command(
            "--model {input.model:q} --train {input.train:q} --seed {wildcards.seed} --device={params.device:q} "
            "--table {output.table:q} --statistics {output.statistics:q} "
            "--tokens {params.tokens:q} {params.limits} {params.options} {params.extras} "
        )
