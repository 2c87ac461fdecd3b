rule collect_routing:
    # One streaming pass over calibration examples: what each expert receives, and what every similarity needs.
    input:
        model=f"{RUN}/full",
        train=f"{RUN}/examples/train.parquet",
    output:
        table=f"{RUN}/routing.parquet",
        statistics=f"{RUN}/routing.safetensors",
    log:
        messages=f"{LOGS}/collect_routing/{{task}}-seed{{seed}}.log",
        usage=f"{BENCHMARKS}/collect_routing/{{task}}-seed{{seed}}.tsv",
    conda:
        "../envs/mcsmoe.yaml"
    threads: CONFIG["calibration"]["threads"]
    resources:
        mem_mb=3000,
        runtime=120,
        gpu=GPUS,
    params:
        code=code("collect_routing"),
        launcher=LAUNCHER,
        launch=LAUNCH,
        script=script("collect_routing"),
        device=DEVICE,
        tokens=TOKENS,
        options=options("calibration"),
        limits=limits(),
        extras=" ".join(EXTRAS),
    message:
        "collect routing statistics of {wildcards.task}, seed {wildcards.seed}"
    shell:
        "python -S -E {params.launcher:q} {params.launch} --usage {log.usage:q} {params.script:q} "
        "--model {input.model:q} --train {input.train:q} --seed {wildcards.seed} --device={params.device:q} "
        "--table {output.table:q} --statistics {output.statistics:q} "
        "--tokens {params.tokens:q} {params.limits} {params.options} {params.extras} "
        "--log {log.messages:q}"
