rule generate_data:
    # Data sets in the hub's own schema from the generator or from packages, so that everything after this reads real files.
    input:
        list(CONFIG["data"]["texts"].values()),
    output:
        train=PLACES.data("{task}", "train"),
        validation=PLACES.data("{task}", "validation"),
    log:
        **logs("generate_data", "{task}"),
    conda:
        "../envs/mcsmoe.yaml"
    threads: 1
    resources:
        mem_mb=800,
        runtime=30,
    params:
        **job("generate_data", LIGHT),
        task=lambda wildcards: TASKS[wildcards.task],
        sources=made_from,
        options=data_options("seed", "train_rows", "validation_rows"),
    message:
        "generate data for {wildcards.task}"
    shell:
        command(
            "--task={params.task:q} "
            "--train {output.train:q} --validation {output.validation:q} "
            "{params.options} {params.sources} "
        )
