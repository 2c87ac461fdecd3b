rule evaluate:
    # Answers of a checkpoint on the validation split, or how well it predicts texts, and its scores with their intervals.
    input:
        unpack(evaluation_reference),
        model=RUN.checkpoint("{checkpoint}"),
        examples=RUN.examples("validation"),
    output:
        predictions=RUN.table("{checkpoint}", "predictions"),
        metrics=RUN.table("{checkpoint}", "metrics"),
    log:
        **logs("evaluate", "{task}-seed{seed}/{checkpoint}"),
    conda:
        "../envs/mcsmoe.yaml"
    threads: CONFIG["evaluate"]["threads"]
    resources:
        mem_mb=2000,
        runtime=120,
        gpu=GPUS,
    params:
        **job("evaluate"),
        device=DEVICE,
        task=lambda wildcards: TASKS[wildcards.task],
        names=labels_of,
        given=given("reference"),
        options=options("evaluate"),
        limits=limits(),
    message:
        "evaluate {wildcards.checkpoint} on {wildcards.task}, seed {wildcards.seed}"
    shell:
        command(
            "--model {input.model:q} --task={params.task:q} --examples {input.examples:q} "
            "--seed {wildcards.seed} {params.names} --device={params.device:q} "
            "--predictions {output.predictions:q} --metrics {output.metrics:q} "
            "{params.limits} {params.options} {params.given}"
        )
