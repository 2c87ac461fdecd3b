rule prepare_data:
    # Raw rows become prompts, targets and choices; a slice of the training set is set aside to select checkpoints on.
    input:
        unpack(raw_data),
    output:
        train=f"{RUN}/examples/train.parquet",
        selection=f"{RUN}/examples/selection.parquet",
        validation=f"{RUN}/examples/validation.parquet",
    log:
        messages=f"{LOGS}/prepare_data/{{task}}-seed{{seed}}.log",
        usage=f"{BENCHMARKS}/prepare_data/{{task}}-seed{{seed}}.tsv",
    conda:
        "../envs/mcsmoe.yaml"
    threads: 1
    resources:
        mem_mb=1500,
        runtime=20,
    params:
        code=code("prepare_data"),
        launcher=LAUNCHER,
        launch=FRESH,
        script=script("prepare_data"),
        task=lambda wildcards: TASKS[wildcards.task],
        described=lambda wildcards: digest_of(described_in(TASKS[wildcards.task])),
        source=raw_source,
        protocol=as_flags({"protocol": CONFIG["evaluate"]["protocol"]}),
        options=data_options("train_rows", "validation_rows", "selection_rows"),
    message:
        "prepare the examples of {wildcards.task}, seed {wildcards.seed}"
    shell:
        "python -S -E {params.launcher:q} {params.launch} --usage {log.usage:q} {params.script:q} "
        "--task={params.task:q} {params.source} --seed {wildcards.seed} "
        "--train {output.train:q} --selection {output.selection:q} --validation {output.validation:q} "
        "{params.options} {params.protocol} "
        "--log {log.messages:q}"
