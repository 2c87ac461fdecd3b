rule profile_cost:
    # Parameters, bytes, memory, FLOPs and time of a checkpoint. Runs alone: a neighbour would be timed with it.
    input:
        model=RUN.checkpoint("{checkpoint}"),
    output:
        table=RUN.table("{checkpoint}", "cost"),
    log:
        **logs("profile_cost", "{task}-seed{seed}/{checkpoint}"),
    conda:
        "../envs/mcsmoe.yaml"
    threads: workflow.cores or 1
    resources:
        mem_mb=3000,
        runtime=60,
        gpu=GPUS,
    params:
        **job("profile_cost", MEASURED),
        device=DEVICE,
        task=lambda wildcards: TASKS[wildcards.task],
        names=labels_of,
        bits=bits_of,
        options=options("cost"),
    message:
        "profile the cost of {wildcards.checkpoint} on {wildcards.task}, seed {wildcards.seed}"
    shell:
        command(
            "--model {input.model:q} --task={params.task:q} --seed {wildcards.seed} {params.names} "
            "--device={params.device:q} --table {output.table:q} {params.options} {params.bits} "
        )
