rule evaluate:
    # Answers of a checkpoint on the validation split, and its scores with their intervals.
    input:
        model=f"{RUN}/{{checkpoint}}",
        examples=f"{RUN}/examples/validation.parquet",
    output:
        predictions=f"{RUN}/{{checkpoint}}_evaluation/predictions.parquet",
        metrics=f"{RUN}/{{checkpoint}}_evaluation/metrics.parquet",
    log:
        messages=f"{LOGS}/evaluate/{{task}}-seed{{seed}}/{{checkpoint}}.log",
        usage=f"{BENCHMARKS}/evaluate/{{task}}-seed{{seed}}/{{checkpoint}}.tsv",
    conda:
        "../envs/mcsmoe.yaml"
    threads: CONFIG["evaluate"]["threads"]
    resources:
        mem_mb=2000,
        runtime=120,
        gpu=GPUS,
    params:
        code=code("evaluate"),
        launcher=LAUNCHER,
        launch=LAUNCH,
        script=script("evaluate"),
        device=DEVICE,
        task=lambda wildcards: TASKS[wildcards.task],
        names=labels_of,
        options=options("evaluate"),
        limits=limits(),
    message:
        "evaluate {wildcards.checkpoint} on {wildcards.task}, seed {wildcards.seed}"
    shell:
        "python -S -E {params.launcher:q} {params.launch} --usage {log.usage:q} {params.script:q} "
        "--model {input.model:q} --task={params.task:q} --examples {input.examples:q} "
        "--seed {wildcards.seed} {params.names} --device={params.device:q} "
        "--predictions {output.predictions:q} --metrics {output.metrics:q} "
        "{params.limits} {params.options} "
        "--log {log.messages:q}"
