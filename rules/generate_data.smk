rule generate_data:
    # Data sets in the hub's own schema from the generator, so that everything after this reads real files.
    output:
        train=f"{RESULTS}/data/{{task}}/train.parquet",
        validation=f"{RESULTS}/data/{{task}}/validation.parquet",
    log:
        messages=f"{LOGS}/generate_data/{{task}}.log",
        usage=f"{BENCHMARKS}/generate_data/{{task}}.tsv",
    conda:
        "../envs/mcsmoe.yaml"
    threads: 1
    resources:
        mem_mb=800,
        runtime=10,
    params:
        code=code("generate_data"),
        launcher=LAUNCHER,
        launch=FRESH,
        script=script("generate_data"),
        task=lambda wildcards: TASKS[wildcards.task],
        options=data_options("seed", "train_rows", "validation_rows"),
    message:
        "generate data for {wildcards.task}"
    shell:
        "python -S -E {params.launcher:q} {params.launch} --usage {log.usage:q} {params.script:q} "
        "--task={params.task:q} "
        "--train {output.train:q} --validation {output.validation:q} "
        "{params.options} "
        "--log {log.messages:q}"
