rule profile_cost:
    # Parameters, bytes, memory, FLOPs and time of a checkpoint. Runs alone: a neighbour would be timed with it.
    input:
        model=f"{RUN}/{{checkpoint}}",
    output:
        table=f"{RUN}/{{checkpoint}}_cost/cost.parquet",
    log:
        messages=f"{LOGS}/profile_cost/{{task}}-seed{{seed}}/{{checkpoint}}.log",
        usage=f"{BENCHMARKS}/profile_cost/{{task}}-seed{{seed}}/{{checkpoint}}.tsv",
    conda:
        "../envs/mcsmoe.yaml"
    threads: workflow.cores or 1
    resources:
        mem_mb=3000,
        runtime=60,
        gpu=GPUS,
    params:
        code=code("profile_cost"),
        launcher=LAUNCHER,
        launch=MEASURED,
        script=script("profile_cost"),
        device=DEVICE,
        task=lambda wildcards: TASKS[wildcards.task],
        names=labels_of,
        options=options("cost"),
    message:
        "profile the cost of {wildcards.checkpoint} on {wildcards.task}, seed {wildcards.seed}"
    shell:
        "python -S -E {params.launcher:q} {params.launch} --usage {log.usage:q} {params.script:q} "
        "--model {input.model:q} --task={params.task:q} --seed {wildcards.seed} {params.names} "
        "--device={params.device:q} --table {output.table:q} {params.options} "
        "--log {log.messages:q}"
